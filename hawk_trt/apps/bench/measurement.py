"""Measures the stages of one prompt at a few keep ratios, in as few runs as a time allows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from hawk_trt.apps.bench.advice import Size, StageTimes
from hawk_trt.request import PruningConfig, Result, Timings
from hawk_trt.stages import in_place

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

MEASURED_RATIOS = (1.0, 0.4, 0.05)
# Tokens until a step costs what all later ones do: the first find cold caches.
_FIRST = 6
_STEPS = 16
_MOST_ROUNDS = 9

# Answers the prompt, never stopping before the given number of tokens.
Ask = Callable[[PruningConfig, int], Result]


def prompt_size(pipe: "Pipeline", result: Result) -> Size:
    """The size of an unpruned result's prompt."""
    return Size(
        num_text=len(result.kept_indices) - result.num_kept,
        num_visual=result.num_visual,
        allocated=pipe.backend.name == "onnxruntime" and in_place(pipe.backend.target),
    )


def measure(ask: Ask, seconds: float, ratios: Sequence[float] = MEASURED_RATIOS) -> list[StageTimes]:
    """Medians at each keep ratio; the ratios take turns, at least twice and then as long as the time allows."""
    begun = time.perf_counter()
    for ratio in ratios:  # the first run of every shape pays for what is made once
        ask(PruningConfig(keep_ratio=ratio), 2)
    rounds: list[list[StageTimes]] = []
    while len(rounds) < 2 or (len(rounds) < _MOST_ROUNDS and time.perf_counter() - begun < seconds):
        rounds.append([measure_once(ask, ratio) for ratio in ratios])
    return [medians(runs) for runs in zip(*rounds, strict=True)]


def measure_once(ask: Ask, ratio: float) -> StageTimes:
    """Run the prompt at one keep ratio: a few tokens far, and some tokens further."""
    pruning = PruningConfig(keep_ratio=ratio)
    first, whole = ask(pruning, _FIRST).timings, ask(pruning, _FIRST + _STEPS).timings
    step = max(_behind_prefill(whole) - _behind_prefill(first), 0.0) / _STEPS
    return StageTimes(
        keep_ratio=ratio,
        new_tokens=_FIRST + _STEPS,
        image=whole.preprocess + whole.vision,
        first_layer=whole.first_layer,
        decoder=whole.decoder,
        rest=max(_behind_prefill(first) - first.decode, 0.0),
        begin=max(first.decode - (_FIRST - 1) * step, 0.0),
        step=step,
    )


def medians(runs: Sequence[StageTimes]) -> StageTimes:
    """The median of each time over runs of the same keep ratio and number of tokens."""
    times = {name.name: float(np.median([getattr(run, name.name) for run in runs])) for name in fields(StageTimes)[2:]}
    return StageTimes(runs[0].keep_ratio, runs[0].new_tokens, **times)


def _behind_prefill(timings: Timings) -> float:
    return timings.total - timings.preprocess - timings.vision - timings.first_layer - timings.decoder
