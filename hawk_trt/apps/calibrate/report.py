"""The weights file of a calibration: the weights, how sure they are, and all that they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from hawk_trt import __version__
from hawk_trt.apps.calibrate.importance import FloatArray, Importance
from hawk_trt.apps.calibrate.work import Plan
from hawk_trt.bundle import Source as CheckpointSource
from hawk_trt.files import write_atomically

_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """One data set's part."""

    name: str
    fingerprint: str
    metric: str
    samples: int
    seed: int
    baseline: float  # mean score of the whole model
    drops: tuple[float, ...]  # how much lower the mean score is without each head
    weights: tuple[float, ...] | None  # of this data set alone; None where no head matters, and then it has no say


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The weights file; see Importance for what was found, work.Plan for how."""

    schema_version: int
    values: tuple[float, ...]  # weight of each query head; they sum to 1
    source: str  # all of it in one line
    intervals: tuple[tuple[float, float], ...]
    uniform_p_value: float
    differs_from_uniform: bool
    scope: str
    keep_ratio: float
    max_new_tokens: int
    max_pixels: int | None
    model: dict[str, str]  # its name, architecture, fingerprint (of its files) and dtype
    datasets: tuple[DatasetReport, ...]
    versions: dict[str, str]  # of what measured


def make_report(
    plan: Plan, model: CheckpointSource, tables: Sequence[FloatArray], found: Importance, versions: dict[str, str]
) -> CalibrationReport:
    """Put together what was found and what it came from; tables: the scores of each source."""
    reports = tuple(
        DatasetReport(
            name=source.name,
            fingerprint=source.fingerprint,
            metric=source.metric,
            samples=len(table),
            seed=source.seed,
            baseline=float(np.mean(table[:, 0])),
            drops=drops,
            weights=weights,
        )
        for source, table, drops, weights in zip(plan.sources, tables, found.drops, found.by_dataset, strict=True)
    )
    counted = ", ".join(f"{report.samples} of {report.name}" for report in reports if report.weights is not None)
    doubt = "" if found.differs_from_uniform else "; NOT TOLD FROM UNIFORM"
    pruned = "unpruned" if plan.keep_ratio == 1.0 else f"keep ratio {plan.keep_ratio:g}"
    return CalibrationReport(
        schema_version=_SCHEMA_VERSION,
        values=found.weights,
        source=f"hawk-trt calibrate: {model.name} ({model.fingerprint[:12]}), {plan.scope}, {pruned}, {counted}{doubt}",
        intervals=found.intervals,
        uniform_p_value=found.uniform_p_value,
        differs_from_uniform=found.differs_from_uniform,
        scope=plan.scope,
        keep_ratio=plan.keep_ratio,
        max_new_tokens=plan.max_new_tokens,
        max_pixels=plan.max_pixels,
        model={name: getattr(model, name) for name in ("name", "architecture", "fingerprint")} | {"dtype": plan.dtype},
        datasets=reports,
        versions={"hawk_trt": __version__, **versions},
    )


def write_report(report: CalibrationReport, path: Path) -> None:
    """Write the weights file, whole or not at all."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
