"""Right answers of the tiny model by selector, on fresh questions, and what must hold of them: `make accuracy`.

In: its bundle. Out: tables as BENCHMARKS.md has them, and exit code 1 where a demand is not met. A killed run goes on.

    at 10 % kept   HAWK is right on 90 % or more
                   by 25 points more often than DivPrune
                   by 50 points more often than a random choice
                   by 25 points more often than with the scores of another question about the same picture
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.output import counted
from hawk_trt.apps.evaluate.datasets import Dataset, Sample, load_dataset
from hawk_trt.apps.evaluate.fastv import FastV, fastv_answerer
from hawk_trt.apps.evaluate.metrics import exact_match
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.evaluate.summary import Interval, difference_interval, mean_interval, summarise
from hawk_trt.apps.evaluate.trials import (
    UNPRUNED,
    Answerer,
    Cell,
    PreparedSample,
    Trial,
    missing,
    pipeline_answerer,
    run_trials,
)
from hawk_trt.apps.parity.reference import Reference
from hawk_trt.bundle import manifest_digest
from hawk_trt.pruning.selectors import Candidates, IntArray, best

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-vlm"
OTHER_QUESTION, FASTV = "another question", "fastv"
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Demand:
    """HAWK at 10 % kept must be right at least so often, or so much more often than another."""

    against: str | None
    at_least: float


DEMANDS = (Demand(None, 0.90), Demand("divprune", 0.25), Demand("random", 0.50), Demand(OTHER_QUESTION, 0.25))


class OtherQuestion:
    """Answers with the tokens that the next sample's question would keep."""

    def __init__(self, pipe: Pipeline, dataset: Dataset, answer: Answerer) -> None:
        self._pipe = pipe
        self._answer = answer
        prompts = [(sample.id, sample.prompt) for sample in dataset]
        self._others = {
            name: next(text for _, text in islice(cycle(prompts), place + 1, None) if text != own)
            for place, (name, own) in enumerate(prompts)
        }

    def __call__(self, prepared: PreparedSample, cell: Cell) -> Trial:
        """Answer one sample."""
        inputs = self._pipe.prepare(self._others[prepared.sample.id], images=prepared.sample.images)
        scores = self._pipe.generate(inputs, pruning=PruningConfig(keep_ratio=1.0), max_new_tokens=1).scores

        def by_other(candidates: Candidates, k: int) -> IntArray:
            return best(scores[candidates.members], k)

        return self._answer(prepared, replace(cell, pruning=replace(cell.pruning, selector=by_other)))


def cells() -> list[Cell]:
    """All that one picture is answered with."""
    made = [Cell(UNPRUNED, PruningConfig(keep_ratio=1.0))]
    main_ones = ("hawk", "random", "divprune", "cdpruner")
    for ratio, names in ((0.2, main_ones), (0.1, (*main_ones, "fastv-input", "dart", "norm")), (0.05, main_ones)):
        made += [Cell(name, PruningConfig(keep_ratio=ratio, selector=name)) for name in names]
    made += [Cell(name, PruningConfig(keep_ratio=0.1)) for name in (OTHER_QUESTION, FASTV)]
    made.append(Cell("hawk", PruningConfig(keep_ratio=0.12)))
    made.append(Cell("hawk, mass 0.85", PruningConfig(keep_ratio=0.2, keep_mass=0.85)))
    for share in (0.25, 0.5):
        pruning = PruningConfig(diversity=share)
        made += [Cell(f"hawk, diversity {share}", replace(pruning, keep_ratio=ratio)) for ratio in (0.1, 0.05)]
    return made


def two_images(dataset: Dataset) -> Dataset:
    """Pairs of pictures and the question of the second: what the model was not trained for."""

    def make() -> Iterator[Sample]:
        first: Sample | None = None
        for sample in dataset:
            if first is None:
                first = sample
            else:
                yield replace(sample, images=(*first.images, *sample.images))
                first = None

    fingerprint = hashlib.sha256(f"two of {dataset.fingerprint}".encode()).hexdigest()
    return Dataset("two images", fingerprint, dataset.count // 2, make)


def main() -> int:
    """Answer, print the tables, and say which demands are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="the tiny model's bundle")
    parser.add_argument("--count", type=int, default=640, help="questions, a multiple of 5 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="of the questions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/accuracy"), help="(default: %(default)s)")
    args = parser.parse_args()
    dataset = load_dataset("tiny", args.count, args.seed)
    with Pipeline.load(args.bundle) as pipe:
        own = pipeline_answerer(pipe, exact_match, MAX_NEW_TOKENS)
        decoder = Reference.load(CHECKPOINT, head_weights=(), normalization="l2").model
        special: dict[str, Answerer] = {
            OTHER_QUESTION: OtherQuestion(pipe, dataset, own),
            FASTV: fastv_answerer(FastV(decoder), pipe, exact_match, MAX_NEW_TOKENS),
        }
        trials = answer_all(pipe, dataset, cells(), special, own, args.out / "results.jsonl", args.seed)
        print(table(trials, cells(), dataset))
        pairs = two_images(dataset)
        quotas = [Cell(UNPRUNED, PruningConfig(keep_ratio=1.0)), Cell("hawk", PruningConfig(keep_ratio=0.1))]
        quotas.append(Cell("hawk, per image", PruningConfig(keep_ratio=0.1, quota="per-image")))
        found = answer_all(pipe, pairs, quotas, {}, own, args.out / "two-images.jsonl", args.seed)
        print(f"\nTwo pictures, the question about the second\n\n{table(found, quotas, pairs)}")
    met = [report(demand, trials) for demand in DEMANDS]
    return 0 if all(met) else 1


def answer_all(
    pipe: Pipeline,
    dataset: Dataset,
    wanted: Sequence[Cell],
    special: dict[str, Answerer],
    own: Answerer,
    path: Path,
    seed: int,
) -> list[Trial]:
    """All trials of a data set, those of an earlier run included."""
    manifest = manifest_digest(pipe.bundle.manifest)
    with closing(ResultLog(path, {"bundle": manifest, "dataset": dataset.fingerprint}, Trial)) as log:
        left = missing(dataset, wanted, log)
        made = run_trials(
            dataset, wanted, log, pipe, lambda sample, cell: special.get(cell.selector, own)(sample, cell), seed
        )
        for _ in counted(made, left, "answers"):
            pass
    ids = {sample.id for sample in dataset}
    return [trial for trial in log.records if trial.sample in ids]


def table(trials: Sequence[Trial], wanted: Sequence[Cell], dataset: Dataset) -> str:
    """Markdown: right answers with their interval, kept tokens and the selector's own time."""
    lines = [f"| selector | keep ratio | tokens kept | right, of {dataset.count} | select, ms |", f"|{' --- |' * 5}"]
    for row in summarise(trials, wanted, [sample.id for sample in dataset]):
        select = "-" if row.latency_ms is None else f"{row.latency_ms['select']:.2f}"
        lines.append(
            f"| {row.selector} | {row.keep_ratio:g} | {row.num_kept:.1f} of {row.num_visual:g} "
            f"| {percent(row.accuracy)} | {select} |"
        )
    return "\n".join(lines)


def report(demand: Demand, trials: Sequence[Trial]) -> bool:
    """Say whether a demand is met."""
    hawk = scores(trials, "hawk")
    if demand.against is None:
        name, interval = "hawk at 10 %", mean_interval(list(hawk.values()))
    else:
        other = scores(trials, demand.against)
        name = f"hawk - {demand.against} at 10 %"
        interval = difference_interval(list(hawk.values()), [other[sample] for sample in hawk])
    met = interval.mean >= demand.at_least
    print(f"{'met' if met else 'NOT MET':8}{name}: {percent(interval)}, at least {100 * demand.at_least:.0f} %")
    return met


def scores(trials: Sequence[Trial], selector: str) -> dict[str, float]:
    """Scores by sample at 10 % kept."""
    return {t.sample: t.score for t in trials if (t.selector, t.keep_ratio) == (selector, 0.1)}


def percent(interval: Interval) -> str:
    """An interval for people: 93.1 % [91.2, 94.7]."""
    return f"{100 * interval.mean:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
