"""The arguments of a Ray Serve application: those of `hawk-trt serve`, and how many replicas of what size.

Ray gives a dictionary, from `serve run ... NAME=VALUE` or from a config file; the command's own parser reads it.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hawk_trt.apps.cli import serve
from hawk_trt.errors import InvalidInput
from hawk_trt.runtime.protocol import backend_for

_PATH = "path"
_OF_RAY = ("host", "port")


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message}. All arguments: hawk-trt serve --help, and docs/scale.md")


def words_of(arguments: Mapping[str, object]) -> list[str]:
    """The arguments as words of a command line; any name may be written with underscores.

    Raises:
        InvalidInput: none that says what to serve, or one that is Ray's own.
    """
    if not arguments.get(_PATH):
        raise InvalidInput("path: missing, expected a bundle or engines: path=/models/3b")
    words = [str(arguments[_PATH])]
    for name, value in arguments.items():
        if name in _OF_RAY:
            raise InvalidInput(
                f"{name}: Ray Serve opens the port itself; say it in the config file, below http_options"
            )
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if name == _PATH or one is False or one in ("false", "False"):
                continue
            words.append(option if one is True or one in ("true", "True") else f"{option}={one}")
    return words


def parse(words: list[str]) -> argparse.Namespace:
    """The options of `hawk-trt serve`, and min_replicas, max_replicas, num_gpus and num_cpus.

    Raises:
        InvalidInput: an unknown one, or a value of the wrong kind.
    """
    parent: argparse.ArgumentParser = _Parser(prog="build")
    commands = parent.add_subparsers()
    serve.add_parser(commands)
    parser = commands.choices["serve"]
    group = parser.add_argument_group("replicas")
    group.add_argument("--min-replicas", type=int, default=1)
    group.add_argument("--max-replicas", type=int, default=1)
    group.add_argument("--num-gpus", type=float)
    group.add_argument("--num-cpus", type=float)
    args = parser.parse_args(words)
    if not args.bundle.is_absolute():
        args.bundle = Path.cwd() / args.bundle
    if not args.bundle.is_dir():
        raise InvalidInput(
            f"{_PATH}: {args.bundle} is no folder here. Give an absolute path, the same on every machine of the cluster"
        )
    if not (0 <= args.min_replicas <= args.max_replicas and args.max_replicas):
        got = f"{args.min_replicas} to {args.max_replicas}"
        raise InvalidInput(f"min_replicas, max_replicas: got {got}, expected 0 <= min <= max and max >= 1")
    args.backend = args.backend or backend_for(args.bundle)
    if args.num_gpus is None:
        args.num_gpus = 1.0 if args.backend == "tensorrt" or (args.device or "").startswith("cuda") else 0.0
    if args.num_cpus is None:
        args.num_cpus = float(args.threads or 1)
    return args
