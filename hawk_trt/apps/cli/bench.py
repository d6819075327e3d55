"""`hawk-trt bench`: time by stage and memory, pruned and not, of a bundle or of engines on this machine."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import Group, Parameter
from rich.console import Console, RenderableType

from hawk_trt import __version__
from hawk_trt.apps.bench import bench as measuring
from hawk_trt.apps.bench.bench import STAGES, BenchPrompt, BenchRow, against
from hawk_trt.apps.cli.doctor import installed_version
from hawk_trt.apps.cli.options import OUTPUT, PRUNING, Json, KeepRatios, MaxNewTokens, Model, Numbers, Where, names
from hawk_trt.apps.cli.output import counted, note, print_json, size, table
from hawk_trt.errors import InvalidInput
from hawk_trt.files.staging import write_atomically
from hawk_trt.request import SELECTORS, PruningConfig
from hawk_trt.runtime.reference import random_inputs

if TYPE_CHECKING:
    from hawk_trt import Pipeline

_QUESTION = "What is in this picture? Describe the most important things."


@Parameter(name="*", group=Group("Prompts", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class BenchPrompts:
    """What is measured.

    Attributes:
        image: an image to ask about; repeatable
        prompt: the question
        sides: square noise images of these sides in pixels instead (default: 448, where no image is given)
        text_tokens: where there is no tokenizer
    """

    image: tuple[str, ...] = ()
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)] = _QUESTION
    sides: Numbers = ()
    text_tokens: int = 32

    def prepared_by(self, pipe: "Pipeline") -> list[BenchPrompt]:
        """The prompts."""
        sides = [int(side) for side in self.sides or ([] if self.image else [448])]
        prompts = [BenchPrompt(Path(image).name, partial(pipe.prepare, self.prompt, [image])) for image in self.image]
        for side in sides:
            if side < 28:
                raise InvalidInput(f"--sides: got {side}, expected pixels, at least 28")
            prompts.append(self._noise(pipe, side))
        return prompts

    def _noise(self, pipe: "Pipeline", side: int) -> BenchPrompt:
        """A noise image as a prompt; without a tokenizer its tensors, random ids around placeholders."""
        rng = np.random.default_rng(side)
        name = f"{side} x {side} px"
        if {"tokenizer.json", "preprocessor_config.json"} <= set(pipe.bundle.manifest.files):
            image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            area = side * side
            return BenchPrompt(name, partial(pipe.prepare, self.prompt, [image], min_pixels=area, max_pixels=area))
        inputs = random_inputs(pipe.bundle.manifest, rng, [(side, side)], 0, self.text_tokens)
        return BenchPrompt(name, lambda: inputs)


def bench(
    model: Model,
    where: Where = Where(),
    prompts: BenchPrompts = BenchPrompts(),
    *,
    keep_ratios: KeepRatios = (1.0, 0.4, 0.2, 0.1),
    selectors: Annotated[
        tuple[str, ...], Parameter(group=PRUNING), names(SELECTORS, name=("--selector", "--selectors"))
    ] = ("hawk",),
    max_new_tokens: MaxNewTokens = 16,
    repeats: int = 7,
    warmup: int = 2,
    plot: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Json = False,
) -> int:
    """Measure time by stage and memory, at several keep ratios and prompt sizes.

    Example: hawk-trt bench artifacts/3b --image photo.jpg --keep-ratio 1,0.4,0.2,0.1

    Args:
        keep_ratios: shares of visual tokens kept, with commas between them; 1 is measured once for all selectors
        selectors: who chooses the kept tokens (docs/selectors.md), with commas between them
        max_new_tokens: generated in each run
        repeats: timed runs of each pair
        warmup: runs before them
        plot: PNG file, to draw stacked stage times by keep ratio
        json: print the measurements as JSON
    """
    with where.open(model) as pipe:
        prepared = prompts.prepared_by(pipe)
        prunings = [PruningConfig(keep_ratio=ratio) for ratio in keep_ratios if ratio == 1.0]
        prunings += [PruningConfig(keep_ratio=r, selector=who) for who in selectors for r in keep_ratios if r != 1.0]
        runs = (warmup + repeats) * len(prepared) * len(prunings)
        ticks = iter(counted(range(runs), runs, "runs"))
        rows = measuring.bench(
            pipe,
            prepared,
            prunings,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            warmup=warmup,
            step=partial(next, ticks, None),
        )
        next(ticks, None)  # the bar ends with its last item
    manifest, backend, warnings = pipe.bundle.manifest, pipe.backend, measuring.unsteady(rows)
    runtime = f"{backend.name} on {backend.device}"
    if json:
        print_json(
            {
                "bundle": str(model),
                "dtype": manifest.precision,
                "backend": backend.name,
                "device": backend.device,
                "target": backend.target,
                "machine": f"{platform.machine()}, {_cpu_name()}",
                "versions": {
                    "python": platform.python_version(),
                    "hawk_trt": __version__,
                    backend.name: installed_version(backend.name)
                    or installed_version(f"{backend.name}-gpu")
                    or "unknown",
                },
                "repeats": repeats,
                "warmup": warmup,
                "max_new_tokens": max_new_tokens,
                "memory_metric": measuring.MEMORY_METRIC,
                "warnings": warnings,
                "rows": rows,
            }
        )
    else:
        last = f"{manifest.precision}, {backend.target}, {runtime}; peak: {measuring.MEMORY_METRIC}"
        Console(width=None if sys.stdout.isatty() else 160).print(*_told(rows), last, sep="\n")
    for warning in warnings:
        note(f"warning: {warning}")
    if plot is not None:
        title = f"{Path(manifest.source.name).name}: {manifest.precision}, {runtime}"
        write_atomically(plot, measuring.plot_rows(rows, title))
        note(f"plot           {plot}")
    return 0


def _told(rows: Sequence[BenchRow]) -> tuple[RenderableType, ...]:
    """A table for each prompt: milliseconds, and how many times faster than unpruned."""
    with_selector = not {row.selector for row in rows} <= {measuring.UNPRUNED, "hawk"}
    tables = []
    for prompt, own in measuring.by_prompt(rows):
        whole = measuring.unpruned(own)
        title = f"{prompt}: {own[0].num_tokens} tokens, {own[0].num_visual} of them visual"
        selector, stages = ["selector"] * with_selector, [stage.replace("_", " ") for stage in STAGES]
        columns = (*selector, "keep", "kept", *stages, "first token", "total", "p90", "KV", "peak")
        shown = table(*columns, left=len(selector), gap=1, title=title)
        for row in own:
            shown.add_row(
                *([row.selector] if with_selector else []),
                f"{row.keep_ratio:g}",
                str(row.num_kept),
                *(f"{row.stages[stage].median:.2f}" for stage in STAGES),
                f"{row.first_token.median:.1f}{against(row.first_token, whole.first_token if whole else None)}",
                f"{row.total.median:.1f}{against(row.total, whole.total if whole else None)}",
                f"{row.total.p90:.1f}",
                size(row.kv_bytes),
                "-" if row.peak_bytes is None else size(row.peak_bytes),
            )
        tables.append(shown)
    legend = (
        "ms, medians, and of the total the 90th percentile; score is part of first layer; "
        "a ratio is how many times faster than keep 1"
    )
    return (*tables, legend)


def _cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
