"""Sampler: draws the tokens of a sequence that does not just take the most probable one.

A token is drawn in transformers' and vLLM's order: logit bias, repetition penalty (over the prompt and the answer),
presence and frequency penalty (OpenAI's, over the answer); then, unless greedy, temperature, top_k, top_p, min_p. One
uniform number a token is drawn from the sequence's own generator, so a sequence with a seed gives the same answer alone
and in a batch.
"""

import numpy as np
import numpy.typing as npt

from hawk_trt.request import SamplingConfig
from hawk_trt.sequence import most_probable


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, config: SamplingConfig, prompt_ids: npt.ArrayLike = ()) -> None:
        """Start a sequence. prompt_ids: int64 [n], the prompt's tokens."""
        self._config = config
        self._generator = np.random.default_rng(self._config.seed)
        self._prompt = np.unique(np.asarray(prompt_ids, np.int64)) if self._config.repetition_penalty != 1.0 else None
        self._counts: dict[int, int] = {}  # of the answer's tokens

    def next_token(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose by float32 [vocab] logits; raises as most_probable does."""
        best = most_probable(logits)
        if self._config.changes_logits:
            logits = self._changed(logits)
            best = int(np.argmax(logits))
        token = best if self._config.greedy else self._drawn(logits, float(logits[best]))
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits with biases, then penalties, as transformers and vLLM apply them."""
        config, logits = self._config, logits.copy()
        for token, bias in dict(config.logit_bias).items():
            if token < logits.size:
                logits[token] += np.float32(bias)
        answer = np.fromiter(self._counts, np.int64, len(self._counts))
        if self._prompt is not None:
            seen = np.union1d(self._prompt, answer)
            values, penalty = logits[seen], np.float32(config.repetition_penalty)
            logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._counts and (config.presence_penalty or config.frequency_penalty):
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answer] -= np.float32(config.presence_penalty) + np.float32(config.frequency_penalty) * counts
        return logits

    def _drawn(self, logits: npt.NDArray[np.float32], highest: float) -> int:
        """A token at random: softmax(logits / temperature) in float64, cut by top_k, then top_p, then min_p."""
        config = self._config
        tokens = _top_k(logits, config.top_k)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
            shifted = (logits[tokens].astype(np.float64) - highest) / config.temperature
        probability = np.exp(shifted)
        probability /= probability.sum()
        kept = _top_p(probability, config.top_p)
        if config.min_p:
            kept = kept[probability[kept] >= config.min_p * probability[kept].max()]
        cumulative = np.cumsum(probability[kept])
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(tokens[kept[min(int(drawn), kept.size - 1)]])


def _top_k(logits: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.intp]:
    """Indices of the top_k largest logits, and of those equal to the last of them, ascending; all where top_k is 0."""
    if top_k == 0 or top_k >= logits.size:
        return np.arange(logits.size)
    return np.flatnonzero(logits >= np.partition(logits, logits.size - top_k)[logits.size - top_k])


def _top_p(probability: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the smallest set of probabilities that reaches top_p, ascending."""
    if top_p >= 1.0:
        return np.arange(probability.size)
    # All values below (1 - top_p) / n together hold less than 1 - top_p, so none of them is needed: this spares
    # sorting the whole vocabulary.
    candidates = np.flatnonzero(probability >= (1.0 - top_p) / probability.size)
    descending = candidates[np.argsort(-probability[candidates], kind="stable")]
    count = int(np.searchsorted(np.cumsum(probability[descending]), top_p)) + 1
    return np.sort(descending[:count])
