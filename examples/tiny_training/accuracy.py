"""How well bundles of the tiny model know its task: python -m examples.tiny_training.accuracy BUNDLE [BUNDLE ...].

The same fresh questions to each bundle, the five kinds alike; a Markdown table of right answers on stdout.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_task import QUESTION_KINDS, Sample, generate
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.evaluate.summary import mean_interval
from hawk_trt.errors import HawkError

_MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """Pictures of one kind."""

    size: int
    things: tuple[int, int]
    aligned: bool

    def __str__(self) -> str:
        """For a table."""
        where = "aligned" if self.aligned else "straddling"
        return f"{self.size} px, {where}, {self.things[0]} to {self.things[1]} glyphs"


SETTINGS = (
    Setting(224, (10, 16), True),
    Setting(224, (20, 30), True),
    Setting(224, (1, 9), True),
    Setting(112, (1, 5), True),
    Setting(336, (10, 16), True),
    Setting(448, (10, 16), True),
    Setting(224, (10, 16), False),
    Setting(336, (10, 16), False),
)
WAYS = (
    ("unpruned", PruningConfig(keep_ratio=1.0)),
    ("HAWK, 20 %", PruningConfig(keep_ratio=0.2)),
    ("HAWK, 10 %", PruningConfig(keep_ratio=0.1)),
    ("DivPrune, 10 %", PruningConfig(keep_ratio=0.1, selector="divprune")),
    ("random, 10 %", PruningConfig(keep_ratio=0.1, selector="random")),
)


def right(pipe: Pipeline, samples: Sequence[Sample], pruning: PruningConfig) -> list[float]:
    """1 for each right answer, else 0."""
    scores = []
    for sample in samples:
        inputs = pipe.prepare(sample.question, images=[sample.image])
        answer = pipe.generate(inputs, pruning=pruning, max_new_tokens=_MAX_NEW_TOKENS).text
        scores.append(float(answer == sample.answer))
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Answer and print."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_training.accuracy", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folders that python -m export made")
    parser.add_argument("--count", type=int, default=300, help="questions about pictures of one kind (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the questions (default: 1)")
    args = parser.parse_args(arguments)
    try:
        print(f"| pictures | bundle | {' | '.join(name for name, _ in WAYS)} | unpruned: {', '.join(QUESTION_KINDS)} |")
        print(f"|{' --- |' * (3 + len(WAYS))}")
        for setting in SETTINGS:
            samples = list(
                generate(args.seed, args.count, size=setting.size, objects=setting.things, aligned=setting.aligned)
            )
            for bundle in args.bundles:
                with Pipeline.load(bundle) as pipe:
                    found = [right(pipe, samples, pruning) for _, pruning in WAYS]
                row = " | ".join(_percent(scores) for scores in found)
                print(f"| {setting} | {bundle.name} | {row} | {_by_kind(samples, found[0])} |", flush=True)
    except HawkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _percent(scores: list[float]) -> str:
    interval = mean_interval(scores)
    return f"{100 * interval.mean:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _by_kind(samples: Sequence[Sample], scores: Sequence[float]) -> str:
    shares = []
    for kind in QUESTION_KINDS:
        own = [score for sample, score in zip(samples, scores, strict=True) if sample.kind == kind]
        shares.append(f"{100 * sum(own) / max(1, len(own)):.0f}")
    return ", ".join(shares)


if __name__ == "__main__":
    sys.exit(main())
