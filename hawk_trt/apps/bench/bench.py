"""Speed and memory of a loaded pipeline, stage by stage, pruned and not, in one process.

In: a pipeline, prompts of several sizes, prunings. Out: a BenchRow for each pair, medians with their spread; a plot.
Runs are interleaved, so that a machine that slows down slows all rows alike; unsteady says where that was not enough.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

import hawk_trt
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import collate
from hawk_trt.pruning import kept_count, weights_for
from hawk_trt.request import ModelInputs, PruningConfig, Result

if TYPE_CHECKING:
    from hawk_trt.bundle import Manifest
    from hawk_trt.pipeline import Pipeline

# In the order in which a request meets them; milliseconds in a row.
STAGES = ("preprocess", "vision", "select", "score", "first_layer", "decoder", "decode_step")
_PREFILL = ("preprocess", "vision", "select", "first_layer", "decoder")
UNPRUNED = "unpruned"  # in place of a selector
# Of the stages, those that no pruning can change.
FIXED_STAGES = ("preprocess", "vision")
# Medians that differ by more, and whose quartiles lie apart, are no chance.
_UNSTEADY = 1.15
_STYLE = Path(hawk_trt.__file__).parent / "data" / "plots.mplstyle"
MEMORY_METRIC = "VmHWM, peak resident memory of the process, weights included"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A prompt to measure: its name, and what makes its tensors, timed as preprocess."""

    name: str
    prepare: Callable[[], ModelInputs]


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds: the median, the quartiles around it, and the times that so many of 100 runs stay below."""

    median: float
    low: float
    high: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One prompt with one selector at one keep ratio."""

    prompt: str
    selector: str
    keep_ratio: float
    num_tokens: int
    num_visual: int
    num_kept: int
    # By name. select is a selector's own time, outside the graphs; score (scores, top-k, gather) is measured on its own
    # and is also a part of first_layer; decode_step is one generated token.
    stages: dict[str, Spread]
    first_token: Spread
    total: Spread
    kv_bytes: int  # of the prompt's keys and values, and of the states of linear layers
    peak_bytes: int | None  # see MEMORY_METRIC; None where the system does not tell


# An answer, the milliseconds of preprocess and score, and the peak in bytes where the system tells.
_Run: TypeAlias = tuple[Result, float, float, int | None]


def bench(
    pipe: "Pipeline",
    prompts: Sequence[BenchPrompt],
    prunings: Sequence[PruningConfig],
    *,
    max_new_tokens: int,
    repeats: int,
    warmup: int,
    step: Callable[[], object],
) -> list[BenchRow]:
    """Measure all pairs of prompt and pruning; step is called after each run, for progress.

    Stop tokens are ignored, and max_new_tokens is at least 2, so that there is a decode step.
    """
    if max_new_tokens < 2 or repeats < 1 or warmup < 0:
        raise InvalidInput(
            f"max_new_tokens, repeats, warmup: got {max_new_tokens}, {repeats}, {warmup}, expected at least 2, 1, 0"
        )
    pairs = [(prompt, pruning) for prompt in prompts for pruning in prunings]
    found: list[list[_Run]] = [[] for _ in pairs]
    for _ in range(warmup + repeats):
        for (prompt, pruning), runs in zip(pairs, found, strict=True):
            runs.append(_measure(pipe, prompt, pruning, max_new_tokens))
            step()
    manifest = pipe.bundle.manifest
    return [
        _row(prompt.name, pruning, runs[warmup:], manifest)
        for (prompt, pruning), runs in zip(pairs, found, strict=True)
    ]


def unsteady(rows: Sequence[BenchRow]) -> list[str]:
    """Where stages that no pruning can change differ between the rows of a prompt: the machine was not quiet then."""
    found = []
    for prompt, own in by_prompt(rows):
        for stage in FIXED_STAGES:
            spreads = [row.stages[stage] for row in own]
            least, most = (end(spreads, key=lambda spread: spread.median) for end in (min, max))
            if most.median > _UNSTEADY * least.median and most.low > least.high:
                found.append(
                    f"{prompt}: {stage} took {least.median:.1f} to {most.median:.1f} ms, though no pruning changes it. "
                    "Something else was running: compare no totals here, and measure again with more --repeats"
                )
    return found


def score_seconds(pipe: "Pipeline", inputs: ModelInputs, pruning: PruningConfig) -> float:
    """Time of first_layer with one token kept: merge, scores, top-k, gather, and next to no layer 0."""
    layout = pipe.processor.layout(inputs)
    visual = pipe.vision_cache.encode([(inputs, layout)])[0]
    weights = weights_for(pipe.bundle, pruning)
    prefill = collate([layout], [kept_count(layout, pruning)], [None], weights)
    begun = time.perf_counter()
    pipe.backend.score(prefill, visual)
    return time.perf_counter() - begun


def _measure(pipe: "Pipeline", prompt: BenchPrompt, pruning: PruningConfig, max_new_tokens: int) -> _Run:
    _reset_peak()
    begun = time.perf_counter()
    inputs = prompt.prepare()
    preprocess = time.perf_counter() - begun
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=max_new_tokens, ignore_eos=True)
    peak_bytes = _peak_bytes()
    return result, 1e3 * preprocess, 1e3 * score_seconds(pipe, inputs, pruning), peak_bytes


def _row(prompt: str, pruning: PruningConfig, runs: Sequence[_Run], manifest: "Manifest") -> BenchRow:
    results, preprocess, score, peaks = zip(*runs, strict=True)
    first: Result = results[0]
    timings = [result.timings for result in results]
    steps = [1e3 * r.timings.decode / max(len(r.token_ids) - 1, 1) for r in results]
    own: dict[str, Sequence[float]] = {"preprocess": preprocess, "score": score, "decode_step": steps}
    prefills = [1e3 * (t.preprocess + t.vision + t.select + t.first_layer + t.decoder) for t in timings]
    return BenchRow(
        prompt=prompt,
        selector=UNPRUNED if pruning.keep_ratio == 1.0 else str(pruning.selector),
        keep_ratio=pruning.keep_ratio,
        num_tokens=len(first.kept_indices) + first.num_visual - first.num_kept,
        num_visual=first.num_visual,
        num_kept=first.num_kept,
        stages={stage: _spread(own.get(stage) or [1e3 * getattr(t, stage) for t in timings]) for stage in STAGES},
        first_token=_spread(np.add(preprocess, prefills)),
        total=_spread(np.add(preprocess, [1e3 * t.total for t in timings])),
        kv_bytes=manifest.cache_bytes(len(first.kept_indices)),
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )


def _spread(values: "Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> Spread:
    return Spread(*np.percentile(values, (50, 25, 75, 90, 95, 99)).tolist())


def _reset_peak() -> None:
    """Let the peak start anew from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return  # not Linux, or not allowed: the peak then is that of the process so far


def _peak_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def plot_rows(rows: Sequence[BenchRow], title: str) -> bytes:
    """A PNG: stacked stage times up to the first token, with quartiles of their sum, one panel a prompt."""
    from matplotlib import rc_context  # an extra that only plots need
    from matplotlib.figure import Figure

    groups = by_prompt(rows)
    bars = max(len(own) for _, own in groups)
    stages = [stage for stage in _PREFILL if any(row.stages[stage].median > 0 for row in rows)]
    with_selector = not {row.selector for row in rows} <= {UNPRUNED, "hawk"}
    with rc_context(fname=_STYLE):
        figure = Figure(figsize=(2.2 + len(groups) * max(2.6, 0.75 * bars), 4.6))
        figure.suptitle(title)
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (prompt, own) in zip(panels, groups, strict=True):
            places = range(len(own))
            bottom = [0.0] * len(own)
            for stage in stages:
                heights = [row.stages[stage].median for row in own]
                axes.bar(places, heights, 0.7, bottom, label=stage.replace("_", " "))
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            whole = unpruned(own)
            names = []
            for place, top, row in zip(places, bottom, own, strict=True):
                first = row.first_token
                axes.vlines(place, first.low, first.high, color="0.2", linewidth=1)
                text = f"{first.median:.3g} ms\n{against(first, whole.first_token if whole else None).strip()}"
                at = (place, max(top, first.high))
                axes.annotate(text, at, (0, 3), textcoords="offset points", ha="center", fontsize="x-small")
                names.append(
                    f"{row.keep_ratio:g}" + (f"\n{row.selector}" if with_selector and row is not whole else "")
                )
            axes.margins(y=0.15)
            axes.grid(visible=False, axis="x")
            axes.set_xticks(places, names, fontsize="x-small" if with_selector else "medium")
            axes.set_title(f"{prompt}, {own[0].num_visual} visual tokens")
            axes.set_xlabel("keep ratio")
        panels[0].set_ylabel("ms to the first token (medians; lines: quartiles)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")  # as the bars are stacked
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def by_prompt(rows: Sequence[BenchRow]) -> list[tuple[str, list[BenchRow]]]:
    """The rows of each prompt."""
    return [(prompt, list(group)) for prompt, group in groupby(rows, key=lambda row: row.prompt)]


def unpruned(rows: Sequence[BenchRow]) -> BenchRow | None:
    """The row that keeps all tokens, where there is one."""
    return next((row for row in rows if row.keep_ratio == 1.0), None)


def against(spread: Spread, whole: Spread | None) -> str:
    """How many times as fast as the unpruned one."""
    return "" if whole is None else f" ({whole.median / spread.median:.2f}x)"
