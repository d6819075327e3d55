"""What int8 and int4 weights cost the tiny model: `make bench-quantised`.

In: its checkpoint. Out: a row a weight format: size of the weight files, right answers at each keep ratio on the same
fresh questions, whether the kept tokens are the float32 bundle's, and the logits of its answers, teacher-forced.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.writer import ExportOptions, export
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.output import counted
from hawk_trt.apps.evaluate.datasets import Sample, load_dataset
from hawk_trt.apps.evaluate.metrics import exact_match
from hawk_trt.apps.evaluate.summary import mean_interval
from hawk_trt.bundle import WeightFormat
from hawk_trt.runtime.trace import traced

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-vlm"
KEEP_RATIOS = (1.0, 0.2, 0.1)
FORMATS = (
    None,
    WeightFormat(8, 128),
    WeightFormat(8, 64),
    WeightFormat(8, 32),
    WeightFormat(4, 128),
    WeightFormat(4, 64),
    WeightFormat(4, 32),
)
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """What one question came to."""

    score: float  # 1 where it is right
    kept: npt.NDArray[np.int64]  # indices of the kept tokens
    tokens: tuple[int, ...]  # of the answer
    logits: npt.NDArray[np.float32]  # [steps, vocab], of the float32 bundle's answer, teacher-forced


def answer(pipe: Pipeline, sample: Sample, keep_ratio: float, float32: Answer | None) -> Answer:
    """Answer a question, then follow the float32 bundle's answer."""
    pruning = PruningConfig(keep_ratio)
    inputs = pipe.prepare(sample.prompt, images=sample.images)
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=MAX_NEW_TOKENS)
    tokens = tuple(result.token_ids) if float32 is None else float32.tokens
    trace = traced(pipe, inputs, pruning, forced_tokens=tokens[:-1])
    score = exact_match(result.text or "", sample)
    return Answer(score, trace.kept_indices, tuple(result.token_ids), trace.logits)


def row(name: str, size_bytes: int, found: Sequence[Sequence[Answer]], float32: Sequence[Sequence[Answer]]) -> str:
    """One line of the table; found: answers by keep ratio."""
    right = [mean_interval([one.score for one in answers]) for answers in found]
    pairs = [(a, b) for mine, theirs in zip(found, float32, strict=True) for a, b in zip(mine, theirs, strict=True)]
    errors = np.concatenate([np.abs(a.logits - b.logits).ravel() for a, b in pairs])
    largest = max(float(np.abs(b.logits).max()) for _, b in pairs)
    same = np.concatenate([a.logits.argmax(-1) == b.logits.argmax(-1) for a, b in pairs])
    kept = np.mean([np.array_equal(a.kept, b.kept) for a, b in pairs])
    cells = [name, f"{size_bytes / 1e6:.2f}"]
    cells += [f"{100 * one.mean:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]" for one in right]
    cells += [f"{100 * kept:.1f}", f"{errors.max() / largest:.1e}", f"{errors.mean() / largest:.1e}"]
    return "| " + " | ".join([*cells, f"{100 * same.mean():.2f}"]) + " |"


def main() -> int:
    """Export, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="questions, a multiple of 5 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=30, help="of the questions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/quantised"), help="(default: %(default)s)")
    args = parser.parse_args()
    samples = list(load_dataset("tiny", args.count, args.seed))
    ratios = "".join(f" right at {100 * ratio:g} %, % |" for ratio in KEEP_RATIOS)
    print(f"{len(samples)} questions, seed {args.seed}; errors of logits as a share of the largest")
    print(f"| weights | MB |{ratios} same tokens kept, % | max error | mean error | same token, % |")
    print(f"|{' --- |' * (6 + len(KEEP_RATIOS))}")
    float32: list[list[Answer]] = []
    for weights in FORMATS:
        name = "float32" if weights is None else f"int{weights.bits}, blocks of {weights.block_size}"
        bundle = export(CHECKPOINT, args.out / name.replace(", blocks of ", "-"), ExportOptions(weights=weights))
        size_bytes = sum(entry.size_bytes for entry in bundle.manifest.files.values() if entry.weights)
        with Pipeline.load(bundle.folder) as pipe:
            cells = [(place, sample) for place in range(len(KEEP_RATIOS)) for sample in enumerate(samples)]
            found: list[list[Answer]] = [[] for _ in KEEP_RATIOS]
            for place, (number, sample) in counted(iter(cells), len(cells), name):
                known = float32[place][number] if float32 else None
                found[place].append(answer(pipe, sample, KEEP_RATIOS[place], known))
        float32 = float32 or found
        print(row(name, size_bytes, found, float32), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
