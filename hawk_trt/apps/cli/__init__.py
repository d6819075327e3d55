"""The commands of `hawk-trt`, one module each, imported only when asked for.

A module has `add_parser(subparsers)` and `run(args)`, which returns the exit code. Results go to stdout,
progress and notes to stderr.
"""
