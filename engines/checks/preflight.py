"""The command python -m engines.checks.preflight: every graph through NVIDIA's parser and builder, without a GPU.

In: bundles, the limits of the engines, and the plugin where it is built. Out: a row a graph: whether TensorRT's
parser and builder take it as the engine builder gives it to them, and how its scratch memory grows with the length. It
runs the builder's own code; see gpuless.py for what a pass means.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from hawk_trt.bundle import Bundle, Manifest
from hawk_trt.engine_folder import Limits
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.stages import STAGES

from ..build_plan import BuildSettings
from ..prepare import PreparedGraph, prepare
from ..profiles import TENSORRT_TARGETS, add_limits, limits_of, plan_profiles
from . import gpuless

_FAILED = 1
# Of tables where there is no terminal to ask.
_WIDTH = 140
# Fused attention needs scratch that grows with the length, a score tensor of each head with its square. Scratch is
# measured at these shares of the limits. A mask's grows with the square too, by so many bytes a pair of tokens at most.
_SHARES = (0.25, 0.5, 1.0)
_MASK_BYTES = 4
_MOST_GROWTH = 1.3


@dataclass(frozen=True, slots=True)
class Row:
    """One graph, built with the plugin or without; counts and sizes are 0 where it was refused.

    Attributes:
        scratch_bytes: at each of _SHARES of the limits; without --scratch at the limits alone.
        growth: the power of the length that scratch grows with, None where it is not measured.
        refusal: why it was refused, None where it was built.
    """

    graph: str
    plugin: bool
    layers: int
    plugin_layers: int
    plan_bytes: int
    scratch_bytes: tuple[int, ...]
    growth: float | None
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
    parser.add_argument(
        "--scratch", action="store_true", help="build at three lengths, and refuse scratch that grows with the square"
    )
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
                yield _built(name, args, manifest, graph, settings, size)
            except BackendError as error:
                yield Row(name, with_plugin, 0, 0, 0, (), None, 0.0, str(error))


def _built(
    name: str,
    args: argparse.Namespace,
    manifest: Manifest,
    graph: PreparedGraph,
    settings: BuildSettings,
    size: Limits,
) -> Row:
    """Build a graph at its limits, and at shares of them to see how its scratch memory grows."""
    from ..builder import build_plan

    scratch, seconds = [], 0.0
    for share in _SHARES if args.scratch else _SHARES[-1:]:
        visual, prompt, context = (
            max(int(share * most), 2) for most in (size.visual_tokens, size.prompt_tokens, size.context)
        )
        part = Limits(visual, max(prompt, visual + 1), context, size.batch)
        built = build_plan(graph, plan_profiles(manifest, graph.stage, graph.inputs, part), settings)
        scratch.append(built.scratch_bytes)
        seconds += built.seconds
    growth = None
    if args.scratch and scratch[-2]:
        growth = round(math.log(scratch[-1] / scratch[-2], _SHARES[-1] / _SHARES[-2]), 2)
    refusal = None
    if growth is not None and growth > _MOST_GROWTH and scratch[-1] > size.batch * size.context**2 * _MASK_BYTES:
        refusal = (
            f"{graph.file.name}: its scratch memory grows with the length to the power of {growth}: TensorRT keeps a "
            f"score tensor, {scratch[-1] / 1e6:.0f} MB at {size.prompt_tokens} tokens, in place of fused attention"
        )
    counts = (built.layers, built.plugin_layers, built.content.nbytes)
    return Row(name, settings.plugin is not None, *counts, tuple(scratch), growth, seconds, refusal)


def _print(report: Report, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("graph", "plugin"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "plugin's", "plan MB", "scratch MB", "grows", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.rows:
        verdict = "[green]built[/green]" if row.refusal is None else "[red]REFUSED[/red]"
        scratch = " / ".join(f"{size / 1e6:.0f}" for size in row.scratch_bytes)
        growth = "" if row.growth is None else f"^{row.growth:.2f}"
        counts = (str(row.layers), str(row.plugin_layers), f"{row.plan_bytes / 1e6:.1f}")
        numbers = (*counts, scratch, growth, f"{row.seconds:.1f}")
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
