"""What int8 and int4 weights bring at a released model's width, beside float32 in the same run.

In: a shape, of which a few layers of random weights are exported in each format, the vocabulary cut in proportion. Out:
a row a format: bytes of the language model's weights, time to load and peak memory of a process of its own, and how
many times faster than float32 prefill and decode step are, unpruned and at 20 % kept, in interleaved rounds.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from benchmarks.gpu_report.stages import noise_prompt
from benchmarks.random_model import cut_config
from benchmarks.timing import Times, interleave, load, median, ratio, run_ours
from export.random_checkpoint import random_checkpoint
from export.real_shapes import SHAPES
from export.writer import ExportOptions, export
from hawk_trt import Pipeline
from hawk_trt.bundle import WeightFormat
from hawk_trt.stages import DECODER, FIRST_LAYER

FORMATS = {
    "float32": None,
    "int8, blocks of 64": WeightFormat(8, 64),
    "int4, blocks of 128": WeightFormat(4, 128),
    "int4, blocks of 64": WeightFormat(4, 64),
    "int4, blocks of 32": WeightFormat(4, 32),
}
KEEP_RATIOS = (1.0, 0.2)
NEW_TOKENS = 12
_LANGUAGE_FILES = (f"{FIRST_LAYER}.data", f"{DECODER}.data")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What it takes to load a bundle and answer once: seconds to load, and peak resident MB of the process."""

    load_seconds: float
    peak_mb: float


def load_once(folder: Path, side: int, threads: int | None) -> None:
    """Load and answer once; prints Loaded as JSON."""
    started = time.perf_counter()
    with Pipeline.load(folder, threads=threads) as pipe:
        seconds = time.perf_counter() - started
        run_ours(pipe, noise_prompt(pipe, 28 * side, 40), 1.0, 2)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def loaded(folder: Path, args: argparse.Namespace) -> Loaded:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quantised_speed", "--load", str(folder), "--side", str(args.side)]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Loaded(*json.loads(done.stdout))


def report(name: str, folder: Path, memory: Loaded, ours: Sequence[Sequence[Times]]) -> str:
    """One line of the table; ours: the format's times by keep ratio, then float32's."""
    size_bytes = sum((folder / file).stat().st_size for file in _LANGUAGE_FILES)
    cells = [name, f"{size_bytes / 1e6:.0f}", f"{memory.load_seconds:.1f}", f"{memory.peak_mb:.0f}"]
    count = len(KEEP_RATIOS)
    for stage in ("prefill", "decode_step"):
        for mine, float32 in zip(ours[:count], ours[count:], strict=True):
            cells.append(f"{ratio(float32, mine, stage):.2f} ({getattr(median(mine), stage):.1f} ms)")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-3b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the language model (default: %(default)s)")
    parser.add_argument("--side", type=int, default=18, help="visual tokens a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of each stage (default: one a core)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        load_once(args.load, args.side, args.threads)
        return 0
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folders = {name: Path(scratch) / str(place) for place, name in enumerate(FORMATS)}
        memory = {}
        for name, folder in folders.items():
            source = Path(scratch) / "config"
            source.mkdir(exist_ok=True)
            checkpoint = random_checkpoint(source, cut_config(args.shape, args.layers, vision_layers=1))
            options = ExportOptions(targets=("cpu",), weights=FORMATS[name], im_end_token_id=0)
            export(checkpoint, folder, options)
            memory[name] = loaded(folder, args)
            print(f"{name}: exported and loaded", file=sys.stderr, flush=True)
        pipes = {n: stack.enter_context(Pipeline.load(f, threads=args.threads)) for n, f in folders.items()}
        inputs = noise_prompt(pipes["float32"], 28 * args.side, 40)
        runs = {
            f"{name} {keep}": partial(run_ours, pipe, inputs, keep, NEW_TOKENS)
            for name, pipe in pipes.items()
            for keep in KEEP_RATIOS
        }
        found = interleave(runs, args.rounds, step=lambda: print(".", end="", file=sys.stderr, flush=True))
        print(
            f"{args.shape}, {args.layers} layers, {args.side**2} visual and 42 text tokens, {platform.machine()}, "
            f"{args.threads or 'all'} threads, {load()}, onnxruntime {metadata.version('onnxruntime')}, "
            f"medians of {args.rounds} interleaved rounds"
        )
        shares = "".join(
            f" {what} at {100 * keep:g} %, times faster |"
            for what in ("prefill", "decode step")
            for keep in KEEP_RATIOS
        )
        print(f"| language weights | MB | load, s | peak, MB |{shares}\n|{' --- |' * (4 + 2 * len(KEEP_RATIOS))}")
        float32 = [found[f"float32 {keep}"] for keep in KEEP_RATIOS]
        for name, folder in folders.items():
            print(report(name, folder, memory[name], [*(found[f"{name} {k}"] for k in KEEP_RATIOS), *float32]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
