"""What a series of trials says: one row for each selector and keep ratio, also as CSV.

Confidence intervals are of 95 %: of a mean score, and of the difference between two over the same samples.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from hawk_trt.apps.evaluate.trials import Cell, Trial
from hawk_trt.request import Timings

# Medians over the same samples that differ by more are no chance.
_UNSTEADY = 1.25
STAGES = [field.name for field in fields(Timings)]  # the total comes last
_MEANS = ("num_visual", "num_kept", "num_tokens", "kv_bytes")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the bounds of its interval."""

    mean: float
    low: float
    high: float


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of scores in [0, 1]: Wilson's interval where every one is 0 or 1, else bootstrap percentiles."""
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


@dataclass(frozen=True, slots=True)
class Row:
    """One selector at one keep ratio; num_visual to kv_bytes are means."""

    selector: str
    keep_ratio: float
    samples: int
    accuracy: Interval
    num_visual: float
    num_kept: float
    num_tokens: float
    kv_bytes: float
    latency_ms: dict[str, float] | None  # median by stage; None where another runtime answered
    on_front: bool = False  # no other row is as accurate in less time

    @property
    def total_ms(self) -> float | None:
        """Median of the whole answer."""
        return None if self.latency_ms is None else self.latency_ms["total"]


def summarise(trials: Sequence[Trial], cells: Sequence[Cell], samples: Sequence[str]) -> list[Row]:
    """One row a cell, in the cells' order, over the given samples; cells without trials are left out."""
    wanted = set(samples)
    by_cell: dict[tuple[str, float], list[Trial]] = {cell.key: [] for cell in cells}
    for trial in trials:
        if trial.sample in wanted and trial.key[1:] in by_cell:
            by_cell[trial.key[1:]].append(trial)
    rows = [_row(key, found) for key, found in by_cell.items() if found]
    front = pareto_front(rows)
    return [replace(row, on_front=row in front) for row in rows]


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats: none is at least as accurate and faster, or more accurate and as fast."""
    timed = [(row, row.total_ms, row.accuracy.mean) for row in rows if row.total_ms is not None]
    return [
        row
        for row, time_ms, accuracy in timed
        if not any(
            other_ms <= time_ms and other >= accuracy and (other_ms < time_ms or other > accuracy)
            for _, other_ms, other in timed
        )
    ]


def unsteady(rows: Sequence[Row]) -> list[str]:
    """Where stages that no pruning can change differ between the rows: the machine was not quiet then."""
    found = []
    for stage in ("preprocess", "vision"):
        times = [row.latency_ms[stage] for row in rows if row.latency_ms is not None]
        if times and max(times) > _UNSTEADY * min(times):
            found.append(
                f"{stage} took {min(times):.1f} to {max(times):.1f} ms, though no pruning changes it. "
                "Something else was running: compare no times here"
            )
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, times in milliseconds; an empty field is a time that was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    accuracy = ("accuracy", "accuracy_low", "accuracy_high")
    times = [f"{stage}_ms" for stage in STAGES]
    writer.writerow(("selector", "keep_ratio", "samples", *accuracy, *_MEANS, *times, "on_front"))
    for row in rows:
        scores = [f"{value:.4f}" for value in (row.accuracy.mean, row.accuracy.low, row.accuracy.high)]
        means = [f"{getattr(row, name):.1f}" for name in _MEANS]
        times = ["" if row.latency_ms is None else f"{row.latency_ms[stage]:.3f}" for stage in STAGES]
        writer.writerow([row.selector, row.keep_ratio, row.samples, *scores, *means, *times, int(row.on_front)])
    return text.getvalue()


def _row(key: tuple[str, float], trials: Sequence[Trial]) -> Row:
    timings = [trial.timings for trial in trials if trial.timings is not None]
    latency_ms = {
        stage: 1e3 * float(np.median([getattr(one, stage) for one in timings])) for stage in STAGES if timings
    }
    accuracy = mean_interval([trial.score for trial in trials])
    num_visual, num_kept, num_tokens, kv_bytes = (
        float(np.mean([getattr(trial, name) for trial in trials])) for name in _MEANS
    )
    return Row(*key, len(trials), accuracy, num_visual, num_kept, num_tokens, kv_bytes, latency_ms or None)
