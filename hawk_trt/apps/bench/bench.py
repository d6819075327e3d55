"""Speed and memory of a loaded pipeline, stage by stage, pruned and not, in one process.

In: a pipeline, prompts of several sizes, keep ratios. Out: a BenchRow for each pair, medians with their spread.
Runs are interleaved, so that a machine that slows down slows all rows alike.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import collate
from hawk_trt.pruning.selection import Source, head_weights, kept_count
from hawk_trt.request import ModelInputs, PruningConfig, Result

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

# In the order in which a request meets them; milliseconds in a row.
STAGES = ("preprocess", "vision", "score", "first_layer", "decoder", "decode_step")
MEMORY_METRIC = "VmHWM, peak resident memory of the process, weights included"
_CLEAR_PEAK = "5"  # what resets VmHWM in /proc/self/clear_refs


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A prompt to measure.

    Attributes:
        name: for the table.
        prepare: makes its tensors; timed as preprocess.
    """

    name: str
    prepare: Callable[[], ModelInputs]


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One prompt at one keep ratio.

    Attributes:
        prompt: its name.
        keep_ratio: share of visual tokens kept.
        num_tokens, num_visual, num_kept: in the prompt, and kept of the visual ones.
        stages: by name. score (scores, top-k, gather) is measured on its own and is also a part of
            first_layer; decode_step is one generated token.
        first_token: from the prompt to the first token.
        total: of the whole request.
        kv_bytes: of the prompt's keys and values.
        peak_bytes: see MEMORY_METRIC; None where the system does not tell.
    """

    prompt: str
    keep_ratio: float
    num_tokens: int
    num_visual: int
    num_kept: int
    stages: dict[str, Spread]
    first_token: Spread
    total: Spread
    kv_bytes: int
    peak_bytes: int | None


@dataclass(slots=True)
class _Samples:
    """What the repeats of one pair gave."""

    results: list[Result]
    preprocess: list[float]
    score: list[float]
    peak_bytes: int | None = None


def bench(
    pipe: "Pipeline",
    prompts: Sequence[BenchPrompt],
    keep_ratios: Sequence[float],
    *,
    max_new_tokens: int,
    repeats: int,
    warmup: int,
    step: Callable[[], object],
) -> list[BenchRow]:
    """Measure all pairs of prompt and keep ratio.

    Args:
        pipe: what is measured.
        prompts: of several sizes.
        keep_ratios: 1.0 is the unpruned model.
        max_new_tokens: generated in each run, stop tokens ignored; at least 2, so that there is a decode step.
        repeats: timed runs of a pair.
        warmup: runs of a pair before them.
        step: called after each run, for progress.

    Raises:
        InvalidInput: too few tokens or repeats, or a prompt that cannot be used.
    """
    if max_new_tokens < 2 or repeats < 1 or warmup < 0:
        raise InvalidInput(
            f"max_new_tokens, repeats, warmup: got {max_new_tokens}, {repeats}, {warmup}, expected at least 2, 1, 0"
        )
    pairs = [(prompt, PruningConfig(keep_ratio=ratio)) for prompt in prompts for ratio in keep_ratios]
    samples = [_Samples([], [], []) for _ in pairs]
    for number in range(warmup + repeats):
        for (prompt, pruning), found in zip(pairs, samples, strict=True):
            _measure(pipe, prompt, pruning, max_new_tokens, found if number >= warmup else _Samples([], [], []))
            step()
    token_bytes = pipe.bundle.manifest.kv_bytes_per_token
    return [_row(prompt, pruning, found, token_bytes) for (prompt, pruning), found in zip(pairs, samples, strict=True)]


def _measure(
    pipe: "Pipeline", prompt: BenchPrompt, pruning: PruningConfig, max_new_tokens: int, found: _Samples
) -> None:
    _reset_peak()
    begun = time.perf_counter()
    inputs = prompt.prepare()
    found.preprocess.append(1e3 * (time.perf_counter() - begun))
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=max_new_tokens, ignore_eos=True)
    found.results.append(result)
    peak = _peak_bytes()
    if peak is not None:
        found.peak_bytes = max(peak, found.peak_bytes or 0)
    found.score.append(1e3 * score_seconds(pipe, inputs, pruning))


def score_seconds(pipe: "Pipeline", inputs: ModelInputs, pruning: PruningConfig) -> float:
    """Time of first_layer with one token kept: merge, scores, top-k, gather, and next to no layer 0."""
    layout = pipe.layout(inputs)
    visual = pipe.encode([inputs], [layout])
    weights = head_weights(pipe.bundle, pruning)
    prefill = collate([layout], [kept_count(layout, pruning)], [None], weights)
    source = Source(pipe.bundle, pipe.backend, [layout], prefill, visual)
    source.scores(0)
    return source.score_seconds


def _row(prompt: BenchPrompt, pruning: PruningConfig, found: _Samples, token_bytes: int) -> BenchRow:
    results = found.results
    first = results[0]
    dropped = first.num_visual - first.num_kept
    num_tokens = len(first.kept_indices) + dropped
    stages = {
        "preprocess": _spread(found.preprocess),
        "vision": _spread([1e3 * r.timings.vision for r in results]),
        "score": _spread(found.score),
        "first_layer": _spread([1e3 * r.timings.first_layer for r in results]),
        "decoder": _spread([1e3 * r.timings.decoder for r in results]),
        "decode_step": _spread([1e3 * r.timings.decode / max(len(r.token_ids) - 1, 1) for r in results]),
    }
    first_tokens = [
        ms + 1e3 * (t.preprocess + t.vision + t.select + t.first_layer + t.decoder)
        for ms, t in zip(found.preprocess, (r.timings for r in results), strict=True)
    ]
    totals = [ms + 1e3 * r.timings.total for ms, r in zip(found.preprocess, results, strict=True)]
    return BenchRow(
        prompt=prompt.name,
        keep_ratio=pruning.keep_ratio,
        num_tokens=num_tokens,
        num_visual=first.num_visual,
        num_kept=first.num_kept,
        stages=stages,
        first_token=_spread(first_tokens),
        total=_spread(totals),
        kv_bytes=len(first.kept_indices) * token_bytes,
        peak_bytes=found.peak_bytes,
    )


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, low, high)


def _reset_peak() -> None:
    """Let the peak start anew from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except OSError:
        return  # not Linux, or not allowed: the peak then is that of the process so far


def _peak_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return None if line is None else int(line.split()[1]) * 1024
