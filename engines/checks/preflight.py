"""The command python -m engines.checks.preflight: every graph through NVIDIA's parser and builder, without a GPU.

In: bundles, the limits of the engines, and the plugin where it is built. Out: a row a graph: whether TensorRT's
parser and builder take it as the engine builder gives it to them, and how its scratch memory grows with the length. It
runs the builder's own code; see gpuless.py for what a pass means.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from hawk_trt.apps.cli.main import make_app, run_app
from hawk_trt.apps.cli.options import Json
from hawk_trt.apps.cli.output import note, print_json, table
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import Limits
from hawk_trt.errors import BackendError
from hawk_trt.stages import STAGES

from ..build_plan import BuildSettings
from ..plugin_library import existing_plugin
from ..prepare import prepare
from ..profiles import TENSORRT_TARGETS, LargestRequest, plan_profiles
from . import gpuless

# Of tables where there is no terminal to ask.
_WIDTH = 140
# Fused attention needs scratch that grows with the length, a score tensor of each head with its square. Scratch is
# measured at these shares of the limits. A mask's grows with the square too, by so many bytes a pair of tokens at most.
_SHARES = (0.5, 1.0)
_MASK_BYTES = 4
_MOST_GROWTH = 1.3


@dataclass(frozen=True, slots=True)
class Row:
    """One graph, built with the plugin or without; counts and sizes are 0 where it was refused."""

    graph: str
    plugin: bool
    layers: int = 0
    plugin_layers: int = 0
    plan_bytes: int = 0
    scratch_bytes: tuple[int, ...] = ()  # at each of _SHARES of the limits; without --scratch at the limits alone
    growth: float | None = None  # the power of the length that scratch grows with, where that is measured
    seconds: float = 0.0
    refusal: str | None = None  # why it was refused


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 all graphs built, 1 one was refused, 2 wrong usage."""
    return run_app(make_app("python -m engines.checks.preflight", command=preflight), arguments)


def preflight(
    bundles: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    largest: LargestRequest = LargestRequest(),
    *,
    plugin: Path | None = None,
    scratch: bool = False,
    json: Json = False,
) -> int:
    """Parse and build every graph of some bundles with NVIDIA's own parser and builder; needs no GPU.

    Args:
        bundles: folders that an export wrote
        plugin: top-k plugin, built for TensorRT 11: build with it too
        scratch: build at two lengths, and refuse scratch that grows with the square
        json: print the report as JSON
    """
    sys.path.insert(0, str(gpuless.packages()))
    from ..builder import TENSORRT_VERSION  # only now is there a tensorrt to import

    # all without it first: a plugin stays registered as long as the process lives
    libraries = (None,) if plugin is None else (None, existing_plugin(plugin))
    loaded = [Bundle.load(folder) for folder in bundles]
    rows = [
        row
        for library in libraries
        for bundle in loaded
        for row in _rows(bundle, largest.limits(bundle.manifest, plugin=library is not None), library, scratch=scratch)
    ]
    library = f"Parser and builder of TensorRT-RTX {gpuless.RTX_VERSION}, graphs as for TensorRT {TENSORRT_VERSION}"
    passed = all(row.refusal is None for row in rows)
    if json:
        print_json({"library": library, "rows": rows, "passed": passed})
    else:
        _print(library, rows, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if plugin is None:
        note("with the plugin: not checked, none was given (make plugin, then --plugin PATH)")
    return 0 if passed else 1


def _rows(bundle: Bundle, size: Limits, plugin: Path | None, *, scratch: bool) -> Iterator[Row]:
    """Build every graph of a bundle that engines are built from; with the plugin, every one that it changes."""
    from ..builder import TENSORRT_VERSION, build_plan

    manifest, with_plugin = bundle.manifest, plugin is not None
    settings = BuildSettings(plugin, None, None, ())
    for target in (target for target in TENSORRT_TARGETS if target in manifest.targets):
        for stage in STAGES:
            graph = prepare(
                bundle, stage, target, max_context=size.context, plugin=with_plugin, tensorrt=TENSORRT_VERSION
            )
            if with_plugin and not graph.has_topk:
                continue
            name = f"{manifest.precision} {graph.file.name}"
            note(f"building {name}")
            plans = []
            try:
                for share in _SHARES if scratch else _SHARES[-1:]:
                    sizes = (size.visual_tokens, size.prompt_tokens, size.context)
                    visual, prompt, context = (max(int(share * most), 2) for most in sizes)
                    part = Limits(visual, max(prompt, visual + 1), context, size.batch)
                    plans.append(build_plan(graph, plan_profiles(manifest, stage, graph.inputs, part), settings))
            except BackendError as error:
                yield Row(name, with_plugin, refusal=str(error))
                continue
            needed = tuple(plan.scratch_bytes for plan in plans)
            growth = growth_of(needed)
            # TensorRT has no fused attention in float32: there is no other way for such a graph
            judged = manifest.dtype != "float32"
            yield Row(
                graph=name,
                plugin=with_plugin,
                layers=plans[-1].layers,
                plugin_layers=plans[-1].plugin_layers,
                plan_bytes=plans[-1].content.nbytes,
                scratch_bytes=needed,
                growth=growth,
                seconds=sum(plan.seconds for plan in plans),
                refusal=scratch_refusal(graph.file.name, needed[-1], growth, size) if judged else None,
            )


def growth_of(scratch_bytes: Sequence[int]) -> float | None:
    """The power of the length that scratch grows with, None where it was measured at one length or is nothing."""
    if len(scratch_bytes) < 2 or not scratch_bytes[-2]:
        return None
    return round(math.log(scratch_bytes[-1] / scratch_bytes[-2], _SHARES[-1] / _SHARES[-2]), 2)


def scratch_refusal(file: str, scratch_bytes: int, growth: float | None, size: Limits) -> str | None:
    """Why a graph is refused whose scratch grows so, None where its attention is fused."""
    if growth is None or growth <= _MOST_GROWTH or scratch_bytes <= size.batch * size.context**2 * _MASK_BYTES:
        return None
    return (
        f"{file}: its scratch memory grows with the length to the power of {growth}: TensorRT keeps a "
        f"score tensor, {scratch_bytes / 1e6:.0f} MB at {size.prompt_tokens} tokens, in place of fused attention"
    )


def _print(library: str, rows: Sequence[Row], console: Console) -> None:
    columns = ("graph", "plugin", "layers", "plugin's", "plan MB", "scratch MB", "grows", "seconds", "")
    shown = table(*columns, left=2, gap=1)
    for row in rows:
        verdict = "[green]built[/green]" if row.refusal is None else "[red]REFUSED[/red]"
        scratch = " / ".join(f"{size / 1e6:.0f}" for size in row.scratch_bytes)
        growth = "" if row.growth is None else f"^{row.growth:.2f}"
        counts = (str(row.layers), str(row.plugin_layers), f"{row.plan_bytes / 1e6:.1f}")
        numbers = (*counts, scratch, growth, f"{row.seconds:.1f}")
        shown.add_row(row.graph, "with" if row.plugin else "without", *numbers, verdict)
    console.print(shown)
    refused = [row.refusal for row in rows if row.refusal is not None]
    for refusal in refused:
        console.print(f"REFUSED {refusal}", style="red", markup=False, soft_wrap=True)
    good = len(rows) - len(refused)
    console.print(f"{library}: {good} of {len(rows)} graphs built", style="red" if refused else "green")


if __name__ == "__main__":
    sys.exit(main())
