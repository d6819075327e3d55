"""The command line, `hawk-trt COMMAND ...`: finds the command's module, runs it, and turns errors into exit codes.

    0    done
    1    failed: one line on stderr (HAWK_DEBUG=1 shows the traceback too)
    2    wrong usage
    130  interrupted

Modules are imported when their command is the one asked for, so that `--help` stays quick.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from hawk_trt import __version__
from hawk_trt.errors import HawkError

# Name: (module, what it does).
COMMANDS = {
    "run": ("hawk_trt.apps.cli.run", "answer a prompt about images and videos, with few of their tokens"),
    "serve": ("hawk_trt.apps.cli.serve", "serve the OpenAI protocol over HTTP"),
    "explain": ("hawk_trt.apps.cli.explain", "draw which visual tokens are kept, and what is answered from them"),
    "parity": ("hawk_trt.apps.cli.parity", "compare a bundle with PyTorch, stage by stage"),
    "eval": ("hawk_trt.apps.cli.evaluate", "answer a data set with every selector and keep ratio"),
    "bench": ("hawk_trt.apps.cli.bench", "measure time by stage and memory at several keep ratios"),
    "calibrate": ("hawk_trt.apps.cli.calibrate", "measure how much each query head matters, by leaving it out"),
    "advise": ("hawk_trt.apps.cli.advise", "predict the time to answer by keep ratio, and recommend one"),
    "export": ("hawk_trt.export.__main__", "turn a Hugging Face checkpoint into a bundle of ONNX graphs"),
    "build": ("hawk_trt.engines.__main__", "build TensorRT engines from a bundle, on the GPU that will run them"),
    "doctor": ("hawk_trt.apps.cli.doctor", "say what works on this machine, and what would add the rest"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code.

    Raises:
        SystemExit: wrong usage, --help or --version, by argparse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    if argv[:1] in (["export"], ["build"]):  # these commands live outside hawk_trt/ and read their options themselves
        return int(_import(COMMANDS[argv[0]][0]).main(argv[1:], prog=f"hawk-trt {argv[0]}"))
    try:
        parser, module = _parser(argv)
        args = parser.parse_args(argv)
        if module is None:
            parser.print_help(sys.stderr)
            return 2
        code = int(module.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has left. What is still buffered goes nowhere, without a message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HawkError as error:
        return _failed(str(error))
    except ModuleNotFoundError as error:  # of an extra
        package = str(error.name).partition(".")[0]
        return _failed(f"this command needs {package}: pip install {package}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _failed(f"{place}{error.strerror or error}")
    except MemoryError:
        return _failed("not enough memory. See what is free: hawk-trt doctor")
    return code


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser, with the options of the one command that argv names, and its module."""
    parser = argparse.ArgumentParser(
        prog="hawk-trt", description="Vision-language models with HAWK visual token pruning.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hawk-trt {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    chosen = None
    for name, (module, summary) in COMMANDS.items():
        if name == wanted:
            chosen = _import(module)
            chosen.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, chosen


def _import(name: str) -> ModuleType:
    """A command's module; export and engines lie beside hawk_trt in a checkout and inside it once installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("hawk_trt.export", "hawk_trt.engines"):
            raise
        return import_module(name.removeprefix("hawk_trt."))


def _failed(message: str) -> int:
    if os.environ.get("HAWK_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
