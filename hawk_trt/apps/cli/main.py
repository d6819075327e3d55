"""The command line, `hawk-trt COMMAND ...`: finds the command's function, calls it, and turns errors into exit codes.

    0    done
    1    failed: one line on stderr (HAWK_DEBUG=1 shows the traceback too)
    2    wrong usage: one line on stderr that names the help
    130  interrupted

Cyclopts reads the options. A command's module is imported when it is the one asked for, so that `--help` stays quick.
"""

import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from cyclopts import App, CycloptsError, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.exceptions import UnusedCliTokensError

from hawk_trt import __version__
from hawk_trt.apps.cli.mistakes import near, to_try
from hawk_trt.apps.cli.vocabulary import SYNONYMS
from hawk_trt.errors import HawkError, InvalidInput

# Name: (function, what it does).
COMMANDS = {
    "run": ("hawk_trt.apps.cli.run:run", "answer a prompt about images and videos, with few of their tokens"),
    "chat": ("hawk_trt.apps.cli.chat:chat", "chat about images in the terminal"),
    "demo": ("hawk_trt.apps.cli.demo:demo", "ask the tiny model that comes along about its images"),
    "serve": ("hawk_trt.apps.cli.serve:serve", "serve the OpenAI protocol over HTTP"),
    "export": ("export.__main__:export_checkpoint", "turn a Hugging Face checkpoint into a bundle of ONNX graphs"),
    "build": ("engines.__main__:build", "build TensorRT engines from a bundle, on the GPU that will run them"),
    "explain": ("hawk_trt.apps.cli.explain:explain", "draw which visual tokens are kept, and the answers from them"),
    "parity": ("hawk_trt.apps.cli.parity:parity", "compare a bundle with PyTorch, stage by stage"),
    "eval": ("hawk_trt.apps.cli.evaluate:evaluate", "answer a data set with every selector and keep ratio"),
    "bench": ("hawk_trt.apps.cli.bench:bench", "measure time by stage and memory at several keep ratios"),
    "calibrate": ("hawk_trt.apps.cli.calibrate:calibrate", "measure how much each query head matters (needs PyTorch)"),
    "advise": ("hawk_trt.apps.cli.advise:advise", "predict the time to answer by keep ratio, and recommend one"),
    "doctor": ("hawk_trt.apps.cli.doctor:doctor", "say what works on this machine, and what would add the rest"),
}
COMPLETION = "--install-completion"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; None takes the process's own arguments.

    Returns:
        The exit code; SystemExit ends wrong usage, --help and --version.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if argv == ["version"]:
        argv = ["--version"]
    app = make_app("hawk-trt", "Vision-language models with HAWK visual token pruning. Begin with: hawk-trt demo")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for place, (name, (function, summary)) in enumerate(COMMANDS.items()):
        # the command that is asked for shows the help of its docstring
        app.command(
            where_it_lies(function),
            name=name,
            sort_key=place,
            help=None if name == wanted else summary,
            synonym=SYNONYMS.get(name, "").split(),
        )
    if wanted is None:
        app.register_install_completion_command(COMPLETION, help="Teach your shell the commands and options.")
    return run_app(app, argv)


def make_app(name: str, help: str | None = None, command: Callable[..., object] | None = None) -> App:
    """A command line in the manner of this project, with one command or with none yet."""
    app = App(
        name=name,
        help=help,
        version=f"hawk-trt {__version__}",
        version_flags=("--version", "-V", "-v"),
        help_format="plaintext",
        default_parameter=Parameter(negative=(), show_default=_default_shown, allow_repeating=True),
        config=(options_of_file, check_integers),
        result_action="return_value",
    )
    if command is not None:
        app.default(command)
    return app


def run_app(app: App, argv: Sequence[str] | None = None) -> int:
    """Run a command line, None for the process's own; returns the exit code, or ends the process as `main` says."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, which change no pixel
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it, and print() would take the other one
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        stream = getattr(sys, name)
        if (
            isinstance(stream, io.TextIOWrapper) and name != "stdin"
        ):  # an answer may hold what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    if re.fullmatch("0*[0-9]", os.environ.get("COLUMNS", "")):  # as a container without a terminal has
        del os.environ["COLUMNS"]  # cyclopts would wrap the help without end
    try:
        if not argv and app.default_command is None:
            from rich.console import Console

            app.help_print([], console=Console(stderr=True))
            return 2
        code = app(argv, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left. What is still buffered goes nowhere, without a message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CycloptsError as error:
        if isinstance(error.__cause__, HawkError):  # a value that its dataclass refused
            return _failed(str(error.__cause__), to_try(error.__cause__, app.name[0], argv))
        command = " ".join([*app.name, *argv[: argv[0] in COMMANDS and app.default_command is None]])
        message = " ".join(str(error).split())
        if isinstance(error, UnusedCliTokensError):
            message = f"got {', '.join(map(repr, error.unused_tokens or ()))} without an option, and needs none there."
        found = re.search(r"Unknown option: \W*([\w-]+).*(?P<hint> Did you mean (\S+)\?)", message)
        if found and not near(found[1], [found[3]]):
            message = message.replace(found["hint"], "")
        tell(f"{message}{'' if message[-1] in '.?' else '.'} See: {command} --help", to_try(error, app.name[0], argv))
        raise SystemExit(2) from None
    except HawkError as error:
        return _failed(str(error), to_try(error, app.name[0], argv))
    except ImportError as error:
        return _failed(_missing(error))
    except OSError as error:
        if error.filename is None:
            return _failed(str(error.strerror or error))
        return _failed(f"{str(error.filename)[:200]}: {error.strerror or error}", to_try(error, app.name[0], argv))
    except MemoryError:
        return _failed("not enough memory. See what is free: hawk-trt doctor")
    if code is None:  # --help, --version
        raise SystemExit(0)
    return int(code)


def options_of_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take options from the YAML file that --config names, where a command has that option; the command line wins."""
    file = next(
        (argument.tokens[-1].value for argument in arguments if "--config" in argument.names and argument.tokens), None
    )
    if file is None:
        return
    yaml = import_module("yaml")
    from cyclopts.config import Yaml

    if not Path(file).is_file():
        raise InvalidInput(f"--config: {file} is no file, expected a YAML file of options, as keep_ratio: 0.2")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
        own = isinstance(content, dict) and isinstance(content.get(commands[0]), dict)  # options of several commands
        Yaml(file, search_parents=False, use_commands_as_keys=own)(app, commands, arguments)
    except (CycloptsError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, CycloptsError) and type(error) is not CycloptsError:  # an unknown option, or a value
            raise
        raise InvalidInput(f"--config {file}: {error}, expected options, as keep_ratio: 0.2") from error


def check_integers(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse what cyclopts would round: 0.5 for an option that counts."""
    for argument in arguments:
        hints = (argument.hint, *get_args(argument.hint))
        for token in argument.tokens if int in hints and float not in hints else ():
            if re.fullmatch(r"[-+]?\d*\.\d*", token.value):
                raise InvalidInput(f"{argument.name}: got {token.value}, expected an integer")


def where_it_lies(function: str) -> str:
    """export/ and engines/ lie inside hawk_trt once installed, and beside it in a checkout that is not installed."""
    folder = function.partition(".")[0]
    return f"hawk_trt.{function}" if folder != "hawk_trt" and find_spec(f"hawk_trt.{folder}") else function


def _default_shown(value: object) -> str | None:
    """How the help shows a default; those that say nothing are left out."""
    if value is None or value is False or value == ():
        return None
    return (
        ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)
        if isinstance(value, tuple)
        else str(value)
    )


def _missing(error: ImportError) -> str:
    """What the command needs and is not installed, with the extra that brings it; raises for a part of this project."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error  # cyclopts wraps those of a command
    package = (cause.name or "").partition(".")[0]
    if not isinstance(cause, ModuleNotFoundError) or package == "hawk_trt":
        raise error
    package = {"PIL": "pillow", "yaml": "pyyaml"}.get(package, package)
    from hawk_trt.apps.cli.extras import extras

    names = {package, package.replace("_", "-")}
    brought = next((f"'hawk-trt[{extra}]'" for extra, packages in extras().items() if names & set(packages)), package)
    return f"this command needs {package}: pip install {brought}"


def _failed(message: str, command: str | None = None) -> int:
    if os.environ.get("HAWK_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    tell(message, command)
    return 1


def tell(message: str, command: str | None) -> None:
    """Print an error, and in a second line the command that would do."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if command:
        print(f"  try: {command}", file=sys.stderr)
