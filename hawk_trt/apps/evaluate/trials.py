"""Trials: one sample answered with one pruning, and whole series of them that go on where they stopped."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hawk_trt.apps.evaluate.datasets import Dataset, Sample
from hawk_trt.apps.evaluate.metrics import Metric
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.errors import InvalidInput
from hawk_trt.request import ModelInputs, PruningConfig, Timings

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

UNPRUNED = "unpruned"


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to answer: a selector's name and its pruning."""

    selector: str
    pruning: PruningConfig

    @property
    def key(self) -> tuple[str, float]:
        """Names the cell in results."""
        return self.selector, self.pruning.keep_ratio


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer."""

    sample: str
    selector: str
    keep_ratio: float
    answer: str
    score: float  # in [0, 1]
    num_visual: int
    num_kept: int
    num_tokens: int  # generated
    kv_bytes: int  # keys and values of the prompt, all layers
    timings: Timings | None  # seconds by stage; None where another runtime answered

    @property
    def key(self) -> tuple[str, str, float]:
        """Sample and cell: what a log knows a trial by."""
        return self.sample, self.selector, self.keep_ratio


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """A sample as tensors, made once for all cells, and the seconds that this took."""

    sample: Sample
    inputs: ModelInputs
    seconds: float


Answerer = Callable[[PreparedSample, Cell], Trial]


def pipeline_answerer(pipe: "Pipeline", metric: Metric, max_new_tokens: int) -> Answerer:
    """Answers with a pipeline."""

    def answer(prepared: PreparedSample, cell: Cell) -> Trial:
        result = pipe.generate(prepared.inputs, pruning=cell.pruning, max_new_tokens=max_new_tokens)
        timings, seconds = result.timings, prepared.seconds  # the tensors were made beforehand
        text = result.text or ""
        return Trial(
            prepared.sample.id,
            *cell.key,
            answer=text,
            score=metric(text, prepared.sample),
            num_visual=result.num_visual,
            num_kept=result.num_kept,
            num_tokens=len(result.token_ids),
            kv_bytes=pipe.bundle.manifest.cache_bytes(len(result.kept_indices)),
            timings=replace(timings, preprocess=timings.preprocess + seconds, total=timings.total + seconds),
        )

    return answer


def prepare(pipe: "Pipeline", sample: Sample, *, max_pixels: int | None = None) -> PreparedSample:
    """Turn a sample into tensors; InvalidInput names the sample where that cannot be done."""
    begun = time.perf_counter()
    try:
        inputs = pipe.prepare(sample.prompt, images=sample.images, videos=sample.videos, max_pixels=max_pixels)
    except InvalidInput as error:
        raise InvalidInput(f"sample {sample.id}: {error}") from error
    return PreparedSample(sample, inputs, time.perf_counter() - begun)


def missing(dataset: Dataset, cells: Sequence[Cell], log: ResultLog[Trial]) -> int:
    """Trials that the log does not hold yet."""
    known = {trial.key for trial in log.records}
    return sum((sample.id, *cell.key) not in known for sample in dataset for cell in cells)


def run_trials(
    dataset: Dataset,
    cells: Sequence[Cell],
    log: ResultLog[Trial],
    pipe: "Pipeline",
    answer: Answerer,
    seed: int,
    max_pixels: int | None = None,
) -> Iterator[Trial]:
    """Answer what the log does not hold yet, sample by sample, and give each trial once it is on disk.

    Before the first, every cell answers once without being counted, so that no trial pays for a runtime's start. Random
    choices differ from sample to sample.
    """
    known = {trial.key for trial in log.records}
    warm: set[tuple[str, float]] = set()
    for number, sample in enumerate(dataset):
        left = [cell for cell in cells if (sample.id, *cell.key) not in known]
        if not left:
            continue
        prepared = prepare(pipe, sample, max_pixels=max_pixels)
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        for cell in left:
            own = replace(cell, pruning=replace(cell.pruning, seed=own_seed))
            if cell.key not in warm:
                answer(prepared, own)
                warm.add(cell.key)
            trial = answer(prepared, own)
            log.append(trial)
            yield trial
