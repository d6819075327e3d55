"""The next token of one row: logits in, a token id out.

Greedy takes the largest logit, the lower index on a tie. Otherwise one uniform number per token is drawn from the
row's own generator, so a row with a seed gives the same answer alone and in a batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import BackendError
from hawk_trt.request import SamplingConfig


class Sampler:
    """Draws the tokens of one row, one after another.

    p = softmax(logits / temperature) in float64, cut to the top_k largest, then to the smallest set whose
    renormalised probability reaches top_p (at least one token); on a tie the lower index stays.
    """

    def __init__(self, config: SamplingConfig | None = None) -> None:
        self._config = config or SamplingConfig()
        self.greedy = self._config.greedy
        self._generator = np.random.default_rng(self._config.seed)

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
        if self._config.greedy:
            return best
        tokens = _top_k(logits, self._config.top_k)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
            shifted = (logits[tokens].astype(np.float64) - float(logits[best])) / self._config.temperature
        probability = np.exp(shifted)
        probability /= probability.sum()
        kept = _top_p(probability, self._config.top_p)
        cumulative = np.cumsum(probability[kept])
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(tokens[kept[min(int(drawn), kept.size - 1)]])


class ForcedSampler:
    """Gives tokens that are known already, then the most probable ones."""

    greedy = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def next_token(self, logits: npt.NDArray[np.float32]) -> int:
        """The next of the tokens."""
        token = next(self._tokens, None)
        return int(np.argmax(logits)) if token is None else token


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
