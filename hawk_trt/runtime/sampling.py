"""The next token of one sequence: logits in, a token id out.

The order is that of transformers' generate: repetition penalty (over the prompt and the answer), presence and frequency
penalty (OpenAI's, over the answer), logit bias; then, unless greedy, temperature, top_k, top_p, min_p. Greedy takes the
largest value, the lower index on a tie. Otherwise one uniform number a token is drawn from the sequence's own
generator, so a sequence with a seed gives the same answer alone and in a batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import BackendError
from hawk_trt.request import SamplingConfig


class Sampler:
    """Draws the tokens of one sequence, one after another.

    Attributes:
        needs_logits: whether the most probable token is not always the one.
    """

    def __init__(self, config: SamplingConfig | None = None, prompt_ids: npt.ArrayLike = ()) -> None:
        """Start a sequence.

        Args:
            config: how to draw; None is greedy.
            prompt_ids: int64 [n], the prompt's tokens.
        """
        self._config = config or SamplingConfig()
        self._generator = np.random.default_rng(self._config.seed)
        self._prompt = np.unique(np.asarray(prompt_ids, np.int64)) if self._config.repetition_penalty != 1.0 else None
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self.needs_logits = not self._config.greedy or self._config.changes_logits

    def next_token(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
            logits: [vocab] float32; -inf means never, at least one must be finite.

        Returns:
            The token id.

        Raises:
            BackendError: NaN or +inf among the logits, or nothing but -inf.
        """
        best = int(np.argmax(logits))  # NaN and +inf win here, so this one value tells whether all can be used
        if not np.isfinite(logits[best]):
            raise BackendError(_non_finite(logits))
        if self._config.changes_logits:
            logits = self._changed(logits)
            best = int(np.argmax(logits))
        token = best if self._config.greedy else self._drawn(logits, float(logits[best]))
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits with penalties and biases."""
        config, logits = self._config, logits.copy()
        answer = np.fromiter(self._counts, np.int64, len(self._counts))
        if self._prompt is not None:
            seen = np.union1d(self._prompt, answer)
            values, penalty = logits[seen], np.float32(config.repetition_penalty)
            logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._counts and (config.presence_penalty or config.frequency_penalty):
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answer] -= np.float32(config.presence_penalty) + np.float32(config.frequency_penalty) * counts
        for token, bias in dict(config.logit_bias).items():
            if token < logits.size:
                logits[token] += np.float32(bias)
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


class ForcedSampler:
    """Gives tokens that are known already, then the most probable ones."""

    needs_logits = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def next_token(self, logits: npt.NDArray[np.float32]) -> int:
        """The next of the tokens."""
        token = next(self._tokens, None)
        return int(np.argmax(logits)) if token is None else token


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Log probabilities of [vocab] logits, float32."""
    shifted = logits.astype(np.float64) - logits.max()
    values: npt.NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return values


def _top_k(logits: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.intp]:
    """Indices of the top_k largest logits, ascending; all where top_k is 0."""
    if top_k == 0 or top_k >= logits.size:
        return np.arange(logits.size)
    cut = np.partition(logits, logits.size - top_k)[logits.size - top_k]
    above = np.flatnonzero(logits > cut)
    level = np.flatnonzero(logits == cut)[: top_k - above.size]
    return np.union1d(above, level)


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


def _non_finite(logits: npt.NDArray[np.float32]) -> str:
    nan, infinite = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    found = f"{nan} NaN and {infinite} +inf" if nan or infinite else "only -inf"
    return f"the decoder produced non-finite logits: {found} among {logits.size} values"
