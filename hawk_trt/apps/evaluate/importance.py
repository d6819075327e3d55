"""From scores to weights: the equations of the method, intervals, and whether the weights mean anything.

    d_ij  = S_base,j - S_ij          mean scores over data set j, whole and without head i
    d'_ij = d_ij - min_i d_ij
    w_i   = mean_j (d'_ij / sum_i d'_ij)

A data set without which no head matters (its sum is 0) has no say. The weights always sum to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput

FloatArray = npt.NDArray[np.float64]

_CONFIDENCE = 0.95
_RESAMPLES = 2000
_PERMUTATIONS = 2000
# Drops are differences of means of scores in [0, 1]; what is smaller is rounding.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Importance:
    """What a calibration found."""

    weights: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]  # 95 % of each weight, bootstrap over questions
    drops: tuple[tuple[float, ...], ...]  # d of each data set and head
    by_dataset: tuple[tuple[float, ...] | None, ...]  # each data set's own weights, None where no head matters there
    uniform_p_value: float  # how often heads that are all alike would differ as much, by permutation

    @property
    def differs_from_uniform(self) -> bool:
        """Whether the heads can be told from heads that all matter alike."""
        return self.uniform_p_value < 1.0 - _CONFIDENCE


def importance(tables: Sequence[FloatArray]) -> Importance:
    """Weights of the heads, from a table [samples, 1 + heads] a data set: scores of the whole model, then without each.

    Raises:
        InvalidInput: no head matters in any data set.
    """
    means = [table.mean(axis=0)[None] for table in tables]
    drops = [mean[:, :1] - mean[:, 1:] for mean in means]
    shares = [_shares(drop) for drop in drops]
    weights = _average(shares)[0]
    if np.isnan(weights).any():
        raise InvalidInput(
            "no head matters more than another: without any one of them the scores are the same. Take more or harder "
            "questions, or a wider --scope"
        )
    low, high = _bootstrap(tables)
    return Importance(
        weights=tuple(weights.tolist()),
        intervals=tuple(zip(low.tolist(), high.tolist(), strict=True)),
        drops=tuple(tuple(drop[0].tolist()) for drop in drops),
        by_dataset=tuple(None if np.isnan(share).any() else tuple(share[0].tolist()) for share in shares),
        uniform_p_value=_uniform_p_value(tables),
    )


def _shares(drops: FloatArray) -> FloatArray:
    """Each row's d' / sum d': [rows, heads], NaN where the sum is 0."""
    above = drops - drops.min(axis=1, keepdims=True)
    total = above.sum(axis=1, keepdims=True)
    shares: FloatArray = np.divide(above, total, out=np.full_like(above, np.nan), where=total > _NOTHING)
    return shares


def _average(shares: Sequence[FloatArray]) -> FloatArray:
    """Mean over the data sets that have a say: [rows, heads], NaN where none has."""
    return np.asarray(np.ma.masked_invalid(np.stack(shares)).mean(axis=0).filled(np.nan))


def _bootstrap(tables: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Percentiles of the weights over questions drawn anew; a draw in which no head matters counts as equal heads."""
    rng = np.random.default_rng(0)  # a fixed seed: the same scores give the same interval
    shares = []
    for table in tables:
        counts = rng.multinomial(len(table), np.full(len(table), 1.0 / len(table)), size=_RESAMPLES)
        means = counts @ table / len(table)
        shares.append(_shares(means[:, :1] - means[:, 1:]))
    weights = _average(shares)
    weights[np.isnan(weights).any(axis=1)] = 1.0 / weights.shape[1]
    low, high = np.quantile(weights, [(1.0 - _CONFIDENCE) / 2, (1.0 + _CONFIDENCE) / 2], axis=0)
    return low, high


def _uniform_p_value(tables: Sequence[FloatArray]) -> float:
    """Permutation test of heads that are all alike: then each question's scores could go to any of its heads.

    The statistic is the spread of the heads' mean scores, of each data set in units of what chance makes of it.
    """
    rng = np.random.default_rng(0)
    # a question that all heads answer alike says nothing, and permuting it changes nothing
    told = [scores[(scores != scores[:, :1]).any(axis=1)] for scores in (table[:, 1:] for table in tables)]
    told = [scores for scores in told if len(scores)]
    scales = [scores.var(axis=1).sum() for scores in told]

    def spread(means: Sequence[FloatArray]) -> float:
        return float(sum(total.var() / scale for total, scale in zip(means, scales, strict=True)))

    seen = spread([scores.sum(axis=0) for scores in told])
    as_wide = sum(
        spread([rng.permuted(scores, axis=1).sum(axis=0) for scores in told]) >= seen * (1.0 - 1e-12)
        for _ in range(_PERMUTATIONS)
    )
    return (1 + as_wide) / (1 + _PERMUTATIONS)
