"""Calibration: how much each query head matters, measured offline by leaving it out; the weights that HAWK scores with.

A plan has units of one question and a few heads. The scores of a unit depend on nothing but the unit and the plan, so
units can be done in any order and anywhere. Out: the weights, how sure they are, and all that they came from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hawk_trt import __version__
from hawk_trt.apps.evaluate.datasets import Sample
from hawk_trt.apps.evaluate.importance import FloatArray, Importance
from hawk_trt.bundle import Bundle
from hawk_trt.bundle import Source as CheckpointSource
from hawk_trt.errors import InvalidInput
from hawk_trt.files.staging import write_atomically

FIRST_LAYER = "first-layer"
ALL_LAYERS = "all-layers"
SCOPES = (FIRST_LAYER, ALL_LAYERS)

BASELINE = -1  # stands for no head at all: the answer of the whole model
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One data set: its questions in the order of a seed, and the metric of their answers."""

    name: str  # short, for files and reports
    questions: Sequence[Sample]
    fingerprint: str  # of all that the questions are
    seed: int
    metric: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the scores depend on."""

    checkpoint: Path
    sources: tuple[Source, ...]
    scope: str  # where heads are left out, one of SCOPES
    open: Callable[..., Bundle]  # makes of the folder, and of its hub id if it has one, a bundle without graphs
    load: Callable[..., Any]  # makes parity's Reference; takes head_weights, normalization, device and dtype too
    special_tokens: Callable[[Bundle], Any]  # what the model's embed takes beside the tensors
    max_new_tokens: int = 32
    max_pixels: int | None = None  # larger images are shrunk to this area; None takes the checkpoint's
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise InvalidInput(f"datasets: got {', '.join(names) or 'none'}, expected at least one, no name twice")


@dataclass(frozen=True, slots=True)
class Unit:
    """A question, by the numbers of its source and of itself, answered without each of some heads or BASELINE."""

    source: int
    number: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """The outcome of a unit: the question's id, and of each head the score in [0, 1] and the answer."""

    sample: str
    heads: tuple[int, ...]
    scores: tuple[float, ...]
    answers: tuple[str, ...]


def units_left(plan: Plan, known: Sequence[Sequence[Scores]], num_heads: int, heads_at_once: int) -> Iterator[Unit]:
    """What is still to be done, question by question; known: what has been done of each source."""
    for place, (source, records) in enumerate(zip(plan.sources, known, strict=True)):
        done = {(record.sample, head) for record in records for head in record.heads}
        for number, question in enumerate(source.questions):
            missing = [head for head in range(BASELINE, num_heads) if (question.id, head) not in done]
            for start in range(0, len(missing), heads_at_once):
                yield Unit(place, number, tuple(missing[start : start + heads_at_once]))


def score_table(source: Source, records: Sequence[Scores], num_heads: int) -> FloatArray:
    """Scores of the questions whose every head is known: [questions, 1 + heads], the whole model's first."""
    rows = {question.id: row for row, question in enumerate(source.questions)}
    table = np.full((len(rows), 1 + num_heads), np.nan)
    for record in records:
        if record.sample in rows:
            table[rows[record.sample], np.array(record.heads) - BASELINE] = record.scores
    complete: FloatArray = table[~np.isnan(table).any(axis=1)]
    return complete


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
    """The weights file; see Importance for what was found, Plan for how."""

    schema_version: int
    values: tuple[float, ...]  # weight of each query head; they sum to 1
    source: str  # all of it in one line
    intervals: tuple[tuple[float, float], ...]
    uniform_p_value: float
    differs_from_uniform: bool
    scope: str
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
    return CalibrationReport(
        schema_version=_SCHEMA_VERSION,
        values=found.weights,
        source=f"hawk-trt calibrate: {model.name} ({model.fingerprint[:12]}), {plan.scope}, unpruned, {counted}{doubt}",
        intervals=found.intervals,
        uniform_p_value=found.uniform_p_value,
        differs_from_uniform=found.differs_from_uniform,
        scope=plan.scope,
        max_new_tokens=plan.max_new_tokens,
        max_pixels=plan.max_pixels,
        model={name: getattr(model, name) for name in ("name", "architecture", "fingerprint")} | {"dtype": plan.dtype},
        datasets=reports,
        versions={"hawk_trt": __version__, **versions},
    )


def write_report(report: CalibrationReport, path: Path) -> None:
    """Write the weights file, whole or not at all."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
