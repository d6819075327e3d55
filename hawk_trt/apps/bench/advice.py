"""What pruning gains on this machine: a small model of the stages' times, fitted to a few runs of them.

    preprocess, vision    fixed by the image
    first_layer, decoder  a + b K + c K C       K kept tokens, text and visual; C columns of the KV cache
    a decode step         a + b C               C on average over the answer; the first ones cost a little more
    the rest of the host  fixed

A hybrid model runs the linear layers before its scoring layer over all tokens, in first_layer: no keep ratio changes
that time, so it is first_layer's a. All coefficients are at least 0. What is recommended is time alone: how right the
answers stay, `hawk-trt eval` says.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.pruning.hawk import num_kept
from hawk_trt.request import PruningConfig, Result, Timings
from hawk_trt.stages import LanguageConfig

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline


FloatArray = npt.NDArray[np.float64]

MEASURED_RATIOS = (1.0, 0.4, 0.05)
# Tokens until a step costs what all later ones do: the first find cold caches.
_FIRST = 6
_STEPS = 16
_MOST_ROUNDS = 9
# Pruning is not worth its loss of detail below this saving.
_LEAST_SAVING = 0.1
# Of the largest saving on offer, what a milder ratio must reach to be preferred.
_MOST_OF_IT = 0.8
_HALF = 0.5


@dataclass(frozen=True, slots=True)
class Size:
    """A prompt, and how the KV cache grows with an answer."""

    num_text: int
    num_visual: int
    allocated: bool  # attention runs over all columns that a request will need (ONNX Runtime), else over those written

    def kept(self, keep_ratio: float) -> int:
        """K: text tokens and kept visual ones."""
        return self.num_text + num_kept(self.num_visual, keep_ratio, 1)

    def prefill_columns(self, keep_ratio: float, new_tokens: int) -> float:
        """C in the prefill."""
        return self.kept(keep_ratio) + (new_tokens - 1 if self.allocated else 0)

    def step_columns(self, keep_ratio: float, new_tokens: int) -> float:
        """C in a decode step, on average over the answer."""
        return self.kept(keep_ratio) + (new_tokens - 1 if self.allocated else new_tokens / 2)


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One keep ratio, measured: medians in seconds, of an answer of new_tokens."""

    keep_ratio: float
    new_tokens: int
    image: float  # preprocess and vision
    first_layer: float
    decoder: float  # prefill, as first_layer
    rest: float  # of the host
    begin: float  # what the first decode steps cost more than later ones, all together
    step: float  # a decode step, with all that the host does for a token


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one keep ratio and answer length."""

    keep_ratio: float
    num_kept: int
    new_tokens: int
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """For one answer length: a keep ratio, or None for no pruning, the share of the time that it saves, and why."""

    new_tokens: int
    keep_ratio: float | None
    saving: float
    reason: str


@dataclass(frozen=True, slots=True)
class WholeShare:
    """What the layers before the scoring layer, which run over all tokens, take of one keep ratio's prefill."""

    keep_ratio: float
    layers: int
    by_products: float  # share of the multiplications of first_layer and decoder, from the sizes alone
    measured: float  # share of the time of both that first_layer takes whatever is kept: those layers, and the scores


class TimeModel:
    """The fitted model of a prompt's size."""

    def __init__(self, size: Size, times: Sequence[StageTimes]) -> None:
        """Fit two keep ratios at least; three or more tell the curve from the line."""
        self.size = size
        self._image, self._rest, self._begin = (
            float(np.median([getattr(time, name) for time in times])) for name in ("image", "rest", "begin")
        )
        prefills = [
            (1.0, size.kept(time.keep_ratio), size.kept(time.keep_ratio) * columns)
            for time in times
            for columns in [size.prefill_columns(time.keep_ratio, time.new_tokens)]
        ]
        self._first_layer = _fit(prefills, [time.first_layer for time in times])
        self._decoder = _fit(prefills, [time.decoder for time in times])
        steps = [(1.0, size.step_columns(time.keep_ratio, time.new_tokens)) for time in times]
        self._step = _fit(steps, [time.step for time in times])

    def predict(self, keep_ratio: float, new_tokens: int) -> Prediction:
        """Seconds to the first token, and of the whole answer."""
        kept = self.size.kept(keep_ratio)
        prefill = np.array([1.0, kept, kept * self.size.prefill_columns(keep_ratio, new_tokens)])
        step = np.array([1.0, self.size.step_columns(keep_ratio, new_tokens)])
        first_token = self._image + self._rest + float(prefill @ (self._first_layer + self._decoder))
        decoding = self._begin + (new_tokens - 1) * float(step @ self._step) if new_tokens > 1 else 0.0
        return Prediction(
            keep_ratio, num_kept(self.size.num_visual, keep_ratio, 1), new_tokens, first_token, first_token + decoding
        )

    def whole_share(self, language: LanguageConfig, keep_ratio: float) -> WholeShare:
        """What a hybrid model's first layers take of a prefill, predicted from the sizes and as measured."""
        kept = self.size.kept(keep_ratio)
        terms = np.array([1.0, kept, kept * self.size.prefill_columns(keep_ratio, 1)])
        prefill = float(terms @ (self._first_layer + self._decoder))
        whole, rest = _products(language, self.size.num_text + self.size.num_visual, kept)
        measured = float(self._first_layer[0]) / prefill if prefill else 0.0
        return WholeShare(keep_ratio, language.scoring_layer, whole / (whole + rest), measured)

    def recommend(self, keep_ratios: Sequence[float], new_tokens: int) -> Recommendation:
        """The mildest ratio that saves most of what can be saved, or none where that is little."""
        full = self.predict(1.0, new_tokens)
        if not self.size.num_visual:
            return Recommendation(new_tokens, None, 0.0, "there are no visual tokens to prune")
        savings = {ratio: 1.0 - self.predict(ratio, new_tokens).total / full.total for ratio in keep_ratios}
        best = max(savings.values())
        if best < _LEAST_SAVING:
            return Recommendation(new_tokens, None, best, self._why_not(full))
        chosen = max(ratio for ratio, saving in savings.items() if saving >= _MOST_OF_IT * best)
        reason = f"saves {_percent(savings[chosen])} of the time"
        if savings[chosen] < best:
            strongest = min(savings, key=lambda ratio: (-savings[ratio], ratio))
            reason += f", and {strongest:g} no more than {_percent(best)}"
        return Recommendation(new_tokens, chosen, savings[chosen], reason)

    def _why_not(self, full: Prediction) -> str:
        """What the time goes to that pruning cannot save."""
        decoding = full.total - full.first_token
        if self._image >= _HALF * full.total:
            share = self._image / full.total
            return (
                f"vision-bound: {_percent(share)} of the time goes to the image before any token can be dropped. "
                "Smaller images help (--max-pixels)"
            )
        if decoding >= _HALF * full.total:
            return (
                f"bound by decoding: {_percent(decoding / full.total)} of the time goes to the answer's "
                f"{full.new_tokens} tokens, and a step costs nearly the same with a shorter prompt"
            )
        tokens = self.size.num_text + self.size.num_visual
        return (
            f"short prompt: it has {tokens} tokens, {self.size.num_visual} of them visual, and the stages take nearly "
            "the same time with fewer"
        )


def _products(language: LanguageConfig, num_tokens: int, kept: int) -> tuple[float, float]:
    """Multiplications of a prefill: of the layers before the scoring layer over all tokens, and of the others."""
    whole = rest = 0.0
    for layer in range(language.num_hidden_layers):
        tokens = num_tokens if layer < language.scoring_layer else kept
        work = tokens * 3.0 * language.hidden_size * language.intermediate_size
        if language.linear is not None and language.is_linear(layer):
            linear = language.linear
            values = linear.num_value_heads * linear.value_head_dim
            projected = linear.conv_dim + 2 * values + 2 * linear.num_value_heads  # q, k, v, gate, output, beta, decay
            state = values * linear.key_head_dim
            # a token decays the state, reads it by its key, writes it and reads it by its query
            work += tokens * (language.hidden_size * projected + linear.conv_dim * linear.conv_kernel + 4 * state)
        else:
            queries = language.num_attention_heads * language.head_dim
            projected = (2 + language.attention_gate) * queries + 2 * language.num_key_value_heads * language.head_dim
            work += tokens * (language.hidden_size * projected + queries * tokens)  # half of the columns, q k and p v
        if layer < language.scoring_layer:
            whole += work
        else:
            rest += work
    return whole, rest


def _fit(rows: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> FloatArray:
    """Least squares of the relative error with no coefficient below 0: the best of all subsets of the columns."""
    # of a time of 0 (a stage that a backend does not tell) the weight is 1, and the fit is 0
    weight = np.array([1.0 / value if value > 0 else 1.0 for value in seconds])
    design, target = np.array(rows) * weight[:, None], np.array(seconds) * weight
    scale = design.max(axis=0)
    columns = range(design.shape[1])
    best, least = np.zeros(len(columns)), float(target @ target)
    for chosen in (list(c) for count in columns for c in itertools.combinations(columns, count + 1)):
        solution = np.linalg.lstsq(design[:, chosen] / scale[chosen], target, rcond=None)[0] / scale[chosen]
        left = float(np.square(design[:, chosen] @ solution - target).sum())
        if (solution >= 0).all() and left < least - 1e-12:
            best, least = np.zeros(len(columns)), left
            best[chosen] = solution
    return best


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# Answers the prompt, never stopping before the given number of tokens.
Ask = Callable[[PruningConfig, int], Result]


def prompt_size(pipe: "Pipeline", result: Result) -> Size:
    """The size of an unpruned result's prompt."""
    return Size(
        num_text=len(result.kept_indices) - result.num_kept,
        num_visual=result.num_visual,
        allocated=pipe.backend.name == "onnxruntime",
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
