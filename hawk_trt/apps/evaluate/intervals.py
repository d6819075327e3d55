"""Confidence intervals of 95 %: of a mean score, and of the difference between two over the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats


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
    if not np.isin(values, (0.0, 1.0)).all():
        return _bootstrap(values)
    found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return Interval(float(values.mean()), float(found.low), float(found.high))


def difference_interval(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean of scores - others over the same samples, with bootstrap percentiles of the pairs' differences."""
    return _bootstrap(np.asarray(scores, np.float64) - np.asarray(others, np.float64))


def _bootstrap(values: npt.NDArray[np.float64]) -> Interval:
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, mean, mean)
    # a fixed seed: the same results give the same interval; batches bound the memory
    found = stats.bootstrap((values,), np.mean, n_resamples=10_000, batch=100, method="percentile", rng=0)
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))
