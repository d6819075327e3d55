"""Confidence intervals of 95 %: of a mean score, and of the difference between two over the same samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution at 97.5 %
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the bounds of its interval."""

    mean: float
    low: float
    high: float


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean score: Wilson's interval where every score is 0 or 1, else bootstrap percentiles.

    Args:
        scores: at least one, each in [0, 1].
    """
    values = np.asarray(scores, np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return _wilson(int(values.sum()), len(values))
    return _bootstrap(values)


def difference_interval(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean of scores - others over the same samples, with bootstrap percentiles of the pairs' differences."""
    return _bootstrap(np.asarray(scores, np.float64) - np.asarray(others, np.float64))


def _wilson(right: int, count: int) -> Interval:
    share = right / count
    spread = _Z * _Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # at the ends the bound is the share itself, but for rounding
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def _bootstrap(values: npt.NDArray[np.float64]) -> Interval:
    # a fixed seed: the same results give the same interval
    rng = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 100):  # in blocks, which bounds the memory
        means[start : start + 100] = values[rng.integers(len(values), size=(100, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))
