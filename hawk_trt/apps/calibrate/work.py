"""The work of a calibration: units of one question and a few heads, who does one, and which are left.

The scores of a unit depend on nothing but the unit and the plan, so units can be done in any order and anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.apps.calibrate.checkpoint import open_checkpoint
from hawk_trt.apps.evaluate.datasets import Dataset, Sample, load_dataset
from hawk_trt.apps.evaluate.metrics import METRICS
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.processor import Processor
from hawk_trt.models.family import family_by_name
from hawk_trt.request import PruningConfig

if TYPE_CHECKING:
    from hawk_trt.apps.parity.reference import EmbeddedPrompt

FIRST_LAYER = "first-layer"
ALL_LAYERS = "all-layers"
SCOPES = (FIRST_LAYER, ALL_LAYERS)

# Stands for no head at all: the answer of the whole model.
BASELINE = -1


@dataclass(frozen=True, slots=True)
class Source:
    """One data set as it was asked for: see evaluation.datasets and evaluation.metrics."""

    dataset: str
    metric: str
    count: int | None
    seed: int

    @property
    def name(self) -> str:
        """Short, for files and reports."""
        return Path(self.dataset).stem or self.dataset

    def load(self) -> Dataset:
        """Open it.

        Raises:
            InvalidInput: no such data set, or a sample that is none.
        """
        return load_dataset(self.dataset, self.count, self.seed)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the scores depend on.

    Attributes:
        checkpoint: its folder.
        sources: data sets.
        scope: where heads are left out, one of SCOPES.
        keep_ratio: of visual tokens, chosen with equal heads; 1.0 measures the unpruned model, as the paper does.
        max_new_tokens: longest answer.
        max_pixels: larger images are shrunk to this area; None takes the checkpoint's.
        dtype: of the model.
        device: of torch.
    """

    checkpoint: Path
    sources: tuple[Source, ...]
    scope: str
    keep_ratio: float = 1.0
    max_new_tokens: int = 32
    max_pixels: int | None = None
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
    """One question, answered without each of some heads.

    Attributes:
        source: which data set.
        number: which of its samples.
        heads: BASELINE among them leaves out none.
    """

    source: int
    number: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """The outcome of a unit.

    Attributes:
        sample: id of the question.
        heads: as in the unit.
        scores: of each answer, in [0, 1].
        answers: themselves.
    """

    sample: str
    heads: tuple[int, ...]
    scores: tuple[float, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _PreparedSample:
    sample: Sample
    prompt: "EmbeddedPrompt"
    kept: list[int]


class Worker:
    """A loaded model that does units. Loading takes seconds to minutes."""

    def __init__(self, plan: Plan) -> None:
        from hawk_trt.apps.calibrate.ablation import AblatedModel  # torch, only for those who do the work
        from hawk_trt.apps.cli.parity import prompt_tokens
        from hawk_trt.apps.parity.reference import Reference

        self._plan = plan
        self._samples: list[list[Sample]] = [list(source.load()) for source in plan.sources]
        bundle = open_checkpoint(plan.checkpoint)
        manifest = bundle.manifest
        self._stop = manifest.special_tokens.eos
        self._tokens = prompt_tokens(bundle)
        self._processor = Processor(bundle, family_by_name(manifest.family))
        self._reference = Reference.load(
            plan.checkpoint,
            head_weights=manifest.head_weights.values,
            normalization=manifest.normalization,
            device=plan.device,
            dtype=plan.dtype,
        )
        self._model = AblatedModel(self._reference, plan.scope, self._stop)
        self._prepared: _PreparedSample | None = None

    def do(self, unit: Unit) -> tuple[Unit, Scores]:
        """Answer and score.

        Raises:
            InvalidInput: an image or video that cannot be used.
        """
        sample = self._samples[unit.source][unit.number]
        prepared = self._prepared
        if prepared is None or prepared.sample is not sample:
            try:
                prepared = self._prepared = self._prepare(sample)
            except InvalidInput as error:
                raise InvalidInput(f"{self._plan.sources[unit.source].name}, sample {sample.id}: {error}") from error
        heads = [None if head == BASELINE else head for head in unit.heads]
        tokens = self._model.answer(prepared.prompt, prepared.kept, heads, self._plan.max_new_tokens)
        chat = self._processor.chat
        assert chat is not None  # open_checkpoint refuses a checkpoint without a tokenizer
        answers = tuple(str(chat.tokenizer.decode(ids)) for ids in tokens)
        metric = METRICS[self._plan.sources[unit.source].metric]
        scores = tuple(metric(answer, sample) for answer in answers)
        return unit, Scores(sample.id, unit.heads, scores, answers)

    def _prepare(self, sample: Sample) -> _PreparedSample:
        inputs = self._processor(sample.prompt, sample.images, sample.videos, max_pixels=self._plan.max_pixels)
        prompt = self._reference.embed(inputs, self._tokens)
        return _PreparedSample(sample, prompt, self._model.kept(prompt, self._plan.keep_ratio))


def units_left(
    samples: Sequence[Sequence[str]], known: Sequence[Sequence[Scores]], num_heads: int, at_once: int
) -> Iterator[Unit]:
    """What is still to be done, question by question.

    Args:
        samples: ids of each data set's.
        known: what has been done of each.
        num_heads: of the model.
        at_once: heads of a unit, at most.
    """
    for source, (ids, records) in enumerate(zip(samples, known, strict=True)):
        done: dict[str, set[int]] = {}
        for record in records:
            done.setdefault(record.sample, set()).update(record.heads)
        for number, sample in enumerate(ids):
            missing = [head for head in range(BASELINE, num_heads) if head not in done.get(sample, ())]
            for start in range(0, len(missing), at_once):
                yield Unit(source, number, tuple(missing[start : start + at_once]))


def score_table(samples: Sequence[str], records: Sequence[Scores], num_heads: int) -> npt.NDArray[np.float64]:
    """Scores of samples whose every head is known: [samples, 1 + heads], the whole model's first."""
    rows = {sample: row for row, sample in enumerate(samples)}
    table = np.full((len(samples), 1 + num_heads), np.nan)
    for record in records:
        if record.sample in rows:
            table[rows[record.sample], np.array(record.heads) - BASELINE] = record.scores
    complete: npt.NDArray[np.float64] = table[~np.isnan(table).any(axis=1)]
    return complete
