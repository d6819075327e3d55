"""What pruning costs a hybrid, in PyTorch: python -m examples.tiny_training.evidence HYBRID SOFTMAX.

The same fresh questions for both checkpoints. In the hybrid, tokens are dropped before its first layer of softmax
attention, and the linear layers below have read all of them by then. What these layers remember shows against tokens
dropped before layer 0, in answers about what was dropped, and where no visual token is kept at all.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig

from examples.tiny_task import QUESTION_KINDS, Sample, generate
from examples.tiny_task.scene import CELL
from examples.tiny_training.hybrid import HybridNetwork
from examples.tiny_training.lessons import Teacher
from examples.tiny_training.network import Network
from examples.tiny_training.trainer import ARCHITECTURES
from hawk_trt.apps.evaluate.summary import Interval, difference_interval, mean_interval
from hawk_trt.errors import HawkError
from hawk_trt.pruning.selectors import best, divprune
from hawk_trt.request import num_kept

RATIOS = (0.2, 0.1)
NOTHING, BELOW = "no visual token", ", dropped before layer 0"
ALSO_BELOW = ("random", "HAWK", "the score of the embeddings", "HAWK by the last token")
_BATCH = 64

Flags = npt.NDArray[np.bool_]


class Found(NamedTuple):
    """One way to choose tokens, over all questions.

    Attributes:
        right: bool [questions].
        kept: bool [questions], whether all that the question is about was kept.
        dropped: bool [questions], whether there is something that it is about, and none of that was kept.
    """

    right: Flags
    kept: Flags
    dropped: Flags


def load_network(folder: Path) -> Network:
    """A checkpoint's weights in float32."""
    architecture, network = ARCHITECTURES[AutoConfig.from_pretrained(folder).model_type]
    return network(architecture.from_pretrained(folder, dtype=torch.float32).eval(), torch.float32)


def answers(network: Network, teacher: Teacher, samples: Sequence[Sample], seed: int) -> dict[str, Found]:
    """What is found for each way, by its name; in a model of softmax attention alone, for those that need no scores."""
    parts: dict[str, list[Found]] = {}
    others = [
        replace(own, question=next(s.question for s in islice(cycle(samples), i, None) if s.question != own.question))
        for i, own in enumerate(samples)
    ]
    for start in range(0, len(samples), _BATCH):
        batch = slice(start, start + _BATCH)
        seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(samples))[batch]]
        for name, found in _answers(network, teacher, samples[batch], others[batch], seeds):
            parts.setdefault(name, []).append(found)
    return {name: Found(*map(np.concatenate, zip(*some, strict=True))) for name, some in parts.items()}


@torch.no_grad()
def _answers(
    network: Network, teacher: Teacher, samples: Sequence[Sample], others: Sequence[Sample], seeds: Sequence[int]
) -> Iterator[tuple[str, Found]]:
    patches, packed = teacher.alone(samples)
    visual = network.visual_tokens(patches)
    asked_for = _asked_for(samples, visual.shape[1])
    hybrid = network if isinstance(network, HybridNetwork) else None

    def found(seen: Flags, first: int | None = None) -> Found:
        shown = replace(packed, seen=torch.from_numpy(seen))
        answer = network.answer_logits if hybrid is None else partial(hybrid.answer_logits, hide_at=first)
        logits, wanted = answer(visual, shown)
        words = torch.ones_like(wanted)
        words[wanted] = logits.argmax(-1) == packed.labels[wanted]
        there = asked_for.any(1)
        all_kept, none_kept = np.all(seen | ~asked_for, axis=1), there & ~np.any(seen & asked_for, axis=1)
        return Found(words.all(-1)[:, 0].numpy(), all_kept, none_kept)

    yield "nothing dropped", found(np.ones_like(asked_for))
    chance = [np.random.default_rng(own).permutation(visual.shape[1]) for own in seeds]
    choosers: dict[str, Callable[[int, int], npt.NDArray[np.int64]]] = {
        "random": lambda i, k: chance[i][:k],
        "DivPrune": lambda i, k: divprune(visual[i].numpy(), k),
    }
    if hybrid is not None:
        _, of_others = teacher.alone(others)
        scores = {
            "HAWK": hybrid.token_scores(visual, packed),
            "the score of the embeddings": hybrid.token_scores(visual, packed, of_embeddings=True),
            "HAWK by another question": hybrid.token_scores(visual, of_others),
            "HAWK by the last token": hybrid.token_scores(visual, packed, by_last=True),
            "HAWK by the last token, another question": hybrid.token_scores(visual, of_others, by_last=True),
        }
        choosers |= {name: partial(_best, of_all.numpy()) for name, of_all in scores.items()}
    for name, choose in choosers.items():
        for ratio in RATIOS:
            seen = np.zeros_like(asked_for)
            for i, row in enumerate(seen):
                row[choose(i, num_kept(len(row), ratio, 1))] = True
            yield way(name, ratio), found(seen)
            if hybrid is not None and name in ALSO_BELOW:
                yield way(name, ratio) + BELOW, found(seen, 0)
    yield NOTHING, found(np.zeros_like(asked_for))
    if hybrid is not None:
        yield NOTHING + BELOW, found(np.zeros_like(asked_for), 0)


def way(name: str, ratio: float) -> str:
    """A choice as the tables name it."""
    return f"{name}, {100 * ratio:.0f} %"


def _best(scores: npt.NDArray[np.float32], i: int, k: int) -> npt.NDArray[np.int64]:
    return best(scores[i], k)


def _asked_for(samples: Sequence[Sample], num_visual: int) -> Flags:
    """The tokens that each question is about: bool [questions, num_visual]."""
    side = round(num_visual**0.5)
    flags = np.zeros((len(samples), num_visual), np.bool_)
    for i, sample in enumerate(samples):
        for box in sample.targets:
            x, y = box.centre
            flags[i, int(y) // CELL * side + int(x) // CELL] = True
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Answer and print."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_training.evidence", description=__doc__)
    parser.add_argument("hybrid", type=Path, help="checkpoint folder of a Qwen3.5")
    parser.add_argument("softmax", type=Path, help="checkpoint folder of a Qwen2.5-VL, trained on the same task")
    parser.add_argument("--count", type=int, default=640, help="questions (default: 640)")
    parser.add_argument("--seed", type=int, default=20, help="of the questions (default: 20)")
    args = parser.parse_args(arguments)
    try:
        samples = list(generate(args.seed, args.count))
        found = [
            answers(load_network(folder), Teacher(folder), samples, args.seed) for folder in (args.hybrid, args.softmax)
        ]
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    hybrid, softmax = found
    print(table(samples, {name: found for name, found in hybrid.items() if not name.endswith(BELOW)}))
    print(f"\nDropped before layer 0\n\n{table(samples, {n: f for n, f in hybrid.items() if n.endswith(BELOW)})}")
    print(f"\n{args.softmax.name}\n\n{table(samples, softmax)}\n\n| difference | points |\n| --- | --- |")
    for ratio in RATIOS:
        hawk, chance = way("HAWK", ratio), way("random", ratio)
        for own, others in (
            ("HAWK", ("the score of the embeddings", "DivPrune", "random", "HAWK by another question")),
            ("HAWK by the last token", ("DivPrune", "HAWK", "HAWK by the last token, another question")),
        ):
            for name in others:
                print(_difference(f"{way(own, ratio)} - {name}", hybrid[way(own, ratio)], hybrid[way(name, ratio)]))
        print(
            _difference(
                f"{hawk}: dropped before softmax attention - before layer 0", hybrid[hawk], hybrid[hawk + BELOW]
            )
        )
        print(_difference(f"{chance}: the same", hybrid[chance], hybrid[chance + BELOW]))
        print(_difference(f"{chance}: hybrid - {args.softmax.name}", hybrid[chance], softmax[chance]))
    print(
        _difference(f"{NOTHING}: before softmax attention - before layer 0", hybrid[NOTHING], hybrid[NOTHING + BELOW])
    )
    return 0


def table(samples: Sequence[Sample], found: Mapping[str, Found]) -> str:
    """Markdown."""
    lines = [
        f"| tokens | right, of {len(samples)} | {', '.join(QUESTION_KINDS)}, % | all asked for was kept "
        "| right where none of it was |",
        f"|{' --- |' * 5}",
    ]
    for name, own in found.items():
        kinds = [100 * own.right[[sample.kind == kind for sample in samples]].mean() for kind in QUESTION_KINDS]
        lost = f"{percent(_share(own.right[own.dropped]))} of {own.dropped.sum()}" if own.dropped.any() else "-"
        lines.append(
            f"| {name} | {percent(_share(own.right))} | {', '.join(f'{kind:.0f}' for kind in kinds)} "
            f"| {100 * own.kept.mean():.1f} % | {lost} |"
        )
    return "\n".join(lines)


def percent(interval: Interval, unit: str = " %") -> str:
    """For a table: 93.1 % [91.2, 94.7]."""
    return f"{100 * interval.mean:.1f}{unit} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(name: str, one: Found, other: Found) -> str:
    return f"| {name} | {percent(difference_interval(one.right.tolist(), other.right.tolist()), '')} |"


def _share(flags: Flags) -> Interval:
    return mean_interval(flags.tolist())


if __name__ == "__main__":
    sys.exit(main())
