"""The commands of `hawk-trt`: one module a command, imported only when that command is asked for.

A command is a function: its parameters are the options, its docstring is the help, and it returns the exit code;
a HawkError that it raises becomes one line on stderr.
Results go to stdout, progress and notes to stderr.
"""
