"""The work of a calibration: the plan, its units of one question and a few heads, and which of them are left.

The scores of a unit depend on nothing but the unit and the plan, so units can be done in any order and anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.request import PruningConfig

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput, VideoInput

FIRST_LAYER = "first-layer"
ALL_LAYERS = "all-layers"
SCOPES = (FIRST_LAYER, ALL_LAYERS)

# Stands for no head at all: the answer of the whole model.
BASELINE = -1


class Question(Protocol):
    """A question, with an id that names it in its data set."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def images(self) -> "Sequence[ImageInput]": ...  # noqa: D102
    @property
    def videos(self) -> "Sequence[VideoInput]": ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Source:
    """One data set: its questions in the order of a seed, and the metric that scores an answer in [0, 1].

    name: short, for files and reports. fingerprint: of all that the questions are.
    """

    name: str
    questions: Sequence[Question]
    fingerprint: str
    seed: int
    metric: str
    score: Callable[[str, Any], float]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the scores depend on."""

    checkpoint: Path
    sources: tuple[Source, ...]
    scope: str  # where heads are left out, one of SCOPES
    open: Callable[..., Bundle]  # makes of the folder, and of its hub id if it has one, a bundle without graphs
    load: Callable[..., Any]  # makes parity's Reference; takes head_weights, normalization, device and dtype too
    special_tokens: Callable[[Bundle], Any]  # what the model's embed takes beside the tensors
    keep_ratio: float = 1.0  # of visual tokens, chosen with equal heads; 1 measures the unpruned model, as the paper
    max_new_tokens: int = 32
    max_pixels: int | None = None  # larger images are shrunk to this area; None takes the checkpoint's
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        PruningConfig(keep_ratio=self.keep_ratio)
        if self.scope not in SCOPES:
            raise InvalidInput(f"scope: got {self.scope!r}, expected one of {', '.join(SCOPES)}")
        if self.max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1")
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


def score_table(source: Source, records: Sequence[Scores], num_heads: int) -> npt.NDArray[np.float64]:
    """Scores of the questions whose every head is known: [questions, 1 + heads], the whole model's first."""
    rows = {question.id: row for row, question in enumerate(source.questions)}
    table = np.full((len(rows), 1 + num_heads), np.nan)
    for record in records:
        if record.sample in rows:
            table[rows[record.sample], np.array(record.heads) - BASELINE] = record.scores
    complete: npt.NDArray[np.float64] = table[~np.isnan(table).any(axis=1)]
    return complete
