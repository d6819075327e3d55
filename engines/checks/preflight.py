"""The command python -m engines.checks.preflight: every graph through NVIDIA's parser and builder, without a GPU.

In: bundles, the limits of the engines, and the plugin where it is built. Out: a row a graph, whether TensorRT's
parser and builder take it as the engine builder gives it to them. It runs the builder's own code; see gpuless.py for
what a pass means.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.stages import STAGES

from ..prepare import prepare
from ..profiles import TENSORRT_TARGETS, add_limits, limits_of, plan_profiles
from . import gpuless

_FAILED = 1
# Of tables where there is no terminal to ask.
_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Row:
    """One graph.

    Attributes:
        graph: its file, with its dtype.
        plugin: whether it was built with the plugin.
        layers: of the network, 0 where it was refused.
        plugin_layers: of these, the plugin's.
        plan_bytes: size of the plan, 0 where it was refused.
        seconds: that parsing and building took.
        refusal: why it was refused, None where it was built.
    """

    graph: str
    plugin: bool
    layers: int
    plugin_layers: int
    plan_bytes: int
    seconds: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All graphs, and what took or refused them."""

    library: str
    rows: tuple[Row, ...]
    passed: bool


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 all graphs built, 1 one was refused, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        if gpuless.LIBRARIES not in os.environ:
            again = ["-m", f"{__package__}.preflight", *(sys.argv[1:] if arguments is None else arguments)]
            os.execve(sys.executable, [sys.executable, *again], gpuless.environment())
        return _run(args)
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engines.checks.preflight",
        description="Parse and build every graph of a bundle with NVIDIA's own parser and builder; needs no GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="folder that an export wrote")
    parser.add_argument(
        "--plugin", type=Path, metavar="PATH", help="top-k plugin, built for TensorRT 11: build with it too"
    )
    add_limits(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    from ..builder import TENSORRT_VERSION  # only now is there a tensorrt to import

    plugin = args.plugin
    if plugin is not None and not plugin.is_file():
        raise InvalidInput(f"--plugin: {plugin} is not there")
    bundles = [Bundle.load(folder) for folder in args.bundles]
    # all without it first: a plugin stays registered as long as the process lives
    libraries = (None,) if plugin is None else (None, plugin)
    rows = tuple(row for library in libraries for bundle in bundles for row in _check(args, bundle, library))
    library = f"TensorRT-RTX's parser and builder through the bindings of TensorRT {TENSORRT_VERSION}"
    report = Report(library, rows, all(row.refusal is None for row in rows))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    else:
        _print(report, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if plugin is None:
        print("with the plugin: not checked, none was given (make plugin, then --plugin PATH)", file=sys.stderr)
    return 0 if report.passed else _FAILED


def _check(args: argparse.Namespace, bundle: Bundle, plugin: Path | None) -> Iterator[Row]:
    """Build every graph of a bundle that engines are built from; with the plugin, every one that it changes."""
    from ..builder import BuildSettings, build_plan

    manifest, with_plugin = bundle.manifest, plugin is not None
    size = limits_of(args, manifest, plugin=with_plugin)
    settings = BuildSettings(None if plugin is None else plugin.resolve(), None, None, ())
    for target in (target for target in TENSORRT_TARGETS if target in manifest.targets):
        for stage in STAGES:
            graph = prepare(bundle, stage, target, max_context=size.context, plugin=with_plugin)
            if with_plugin and not graph.has_topk:
                continue
            name = f"{manifest.precision} {graph.file.name}"
            try:
                built = build_plan(graph, plan_profiles(manifest, stage, graph.inputs, size), settings)
            except BackendError as error:
                yield Row(name, with_plugin, 0, 0, 0, 0.0, str(error))
            else:
                counts = (built.layers, built.plugin_layers, built.content.nbytes)
                yield Row(name, with_plugin, *counts, built.seconds, None)


def _print(report: Report, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("graph", "plugin"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "plugin's", "plan MB", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.rows:
        verdict = "[green]built[/green]" if row.refusal is None else "[red]REFUSED[/red]"
        numbers = (str(row.layers), str(row.plugin_layers), f"{row.plan_bytes / 1e6:.1f}", f"{row.seconds:.1f}")
        table.add_row(row.graph, "with" if row.plugin else "without", *numbers, verdict)
    console.print(table)
    for row in report.rows:
        if row.refusal is not None:
            console.print(f"REFUSED {row.refusal}", style="red", markup=False, soft_wrap=True)
    good = sum(row.refusal is None for row in report.rows)
    console.print(
        f"{report.library}: {good} of {len(report.rows)} graphs built", style="green" if report.passed else "red"
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the bindings' destructors do not survive this mix
