"""Peers beside hawk_trt on the same weights, images, prompt and number of threads: `make bench-peers`.

Each runs in a process and an environment of its own (`make peers` makes them), all of them at the same time, and they
answer in turn, round by round. Out: the processor, versions, and a table for each model and number of visual tokens:
medians, and how many times as long each takes as hawk_trt in float32 with as many tokens kept. A peer that cannot run
is a row that says why. On a busy machine look at the processor time.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers.environments import PLACE
from benchmarks.peers.process import PEERS, Process, Setting
from benchmarks.peers.worker import Answer, Ask
from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load, processor_name
from export.writer import ExportOptions, export
from hawk_trt.bundle import Bundle, WeightFormat

PROMPT = "What is in this picture?"
COLUMNS = {"first_token_ms": "first token", "token_ms": "later token", "total_ms": "in all", "cpu_ms": "processor time"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str  # what it is called
    peer: str  # who answers
    keep_ratio: float = 1.0  # of the visual tokens; the row is held against hawk_trt's in float32 with as many kept
    variant: str = ""  # of the peer


ROWS = (
    Row("hawk_trt", "hawk_trt"),
    Row("hawk_trt, int8", "hawk_trt, int8"),
    Row("transformers, eager", "transformers", variant="eager"),
    Row("transformers, SDPA", "transformers", variant="sdpa"),
    Row("transformers, SDPA, compiled", "transformers", variant="compiled"),
    Row("OpenVINO GenAI", "OpenVINO GenAI"),
    Row("OpenVINO GenAI, int8, its defaults", "OpenVINO GenAI, int8, defaults"),
    Row("onnxruntime-genai", "onnxruntime-genai"),
    Row("hawk_trt, 20 %", "hawk_trt", 0.2),
    Row("hawk_trt, int8, 20 %", "hawk_trt, int8", 0.2),
    Row("transformers, SDPA, with HAWK, 20 %", "transformers", 0.2, "sdpa"),
    Row("OpenVINO, CDPruner, split, 20 %", "OpenVINO GenAI", 0.2),
    Row("OpenVINO, CDPruner, whole, 20 %", "OpenVINO GenAI, whole kernel", 0.2),
    Row("OpenVINO, int8, defaults, split, 20 %", "OpenVINO GenAI, int8, defaults", 0.2),
)


def prepare(args: argparse.Namespace, shape: str) -> Path:
    """The folder of a model with the bundles; the other peers' models come beside them."""
    if args.checkpoint is None:
        models: Path = args.out / f"{shape}-{args.layers}-{args.vision_layers}"
        checkpoint, _ = make_model(models, cut_config(shape, args.layers, args.vision_layers))
    else:
        models, checkpoint = args.out / args.checkpoint.resolve().name, args.checkpoint.resolve()
        models.mkdir(parents=True, exist_ok=True)
        if not (models / "checkpoint").exists():
            (models / "checkpoint").symlink_to(checkpoint)
        export(checkpoint, models / "bundle", ExportOptions())
    export(checkpoint, models / "bundle-int8", ExportOptions(weights=WeightFormat(8, 64)))
    return models


def noise(models: Path, num_visual: int) -> Path:
    """A square noise image of about so many visual tokens."""
    side = round(num_visual**0.5) * Bundle.load(models / "bundle").manifest.vision.token_side
    path = models / f"noise-{side}.png"
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def measure(
    processes: dict[str, Process], rows: list[Row], image: Path, args: argparse.Namespace, until: float
) -> dict[str, list[Answer]]:
    """The answers of every row, in rounds, until the time is over."""
    answers: dict[str, list[Answer]] = {row.title: [] for row in rows}
    for number in range(args.warm_up + args.rounds):
        if number > args.warm_up and time.monotonic() > until:
            break
        for row in rows:
            ask = Ask(str(image), PROMPT, row.keep_ratio, args.max_new_tokens, row.variant)
            answer = processes[row.peer].ask(ask)
            if answer is not None and number >= args.warm_up:
                answers[row.title].append(answer)
            print(".", end="", file=sys.stderr, flush=True)
    return answers


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="one model (default: random weights of the shapes)")
    parser.add_argument("--shapes", nargs="*", default=["qwen2.5-vl-3b", "qwen3-vl-2b"], help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of random weights (default: %(default)s)")
    parser.add_argument("--vision-layers", type=int, default=2, help="of random weights (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[430, 1296], help="visual ones (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", help="those whose titles hold one of these (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no round afterwards (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each peer (default: %(default)s)")
    parser.add_argument("--prepare-only", action="store_true", help="make and convert the models")
    parser.add_argument("--out", type=Path, default=PLACE / "models", help="(default: %(default)s)")
    parser.add_argument("--environments", type=Path, default=PLACE, help="(default: %(default)s)")
    args = parser.parse_args()
    args.out = args.out.absolute()
    shapes = args.shapes if args.checkpoint is None else [args.checkpoint.name]
    rows = [row for row in ROWS if not args.rows or any(part in row.title for part in ["hawk_trt", *args.rows])]
    cases = [(shape, prepare(args, shape)) for shape in shapes]
    begun, done = time.monotonic(), 0
    complete = True
    print(f"{processor_name()}, {args.threads} threads; {args.layers} language and {args.vision_layers} vision layers")
    print(f"ms for {args.max_new_tokens} tokens; in brackets how many times as long as hawk_trt with as many kept")
    for shape, models in cases:
        setting = Setting(models, args.environments.absolute(), args.threads)
        processes = {peer.name: Process(peer, setting) for peer in PEERS if peer.name in {row.peer for row in rows}}
        if not args.prepare_only:
            for num_visual in args.tokens:
                done += 1
                share = done / (len(cases) * len(args.tokens))
                answers = measure(processes, rows, noise(models, num_visual), args, begun + 60 * args.minutes * share)
                print(file=sys.stderr)
                _print(f"{shape}, {num_visual} visual tokens", rows, answers, processes)
                complete &= bool(answers["hawk_trt"])
        for name, process in processes.items():
            versions = ", ".join(f"{package} {version}" for package, version in process.versions.items())
            print(f"{name}: {process.failure or versions}; peak resident memory (VmHWM) {process.stop():,.0f} MB")
    return int(not complete and not args.prepare_only)


def _print(title: str, rows: list[Row], answers: dict[str, list[Answer]], processes: dict[str, Process]) -> None:
    print(f"\n{title}, medians of {len(answers['hawk_trt'])} rounds, {load()}")
    print(f"{'':40s}" + "".join(f"{head:>20s}" for head in COLUMNS.values()) + "  answer")
    for row in rows:
        base = answers["hawk_trt" if row.keep_ratio == 1.0 else "hawk_trt, 20 %"]
        print(f"{row.title:40s}" + _cells(answers[row.title], base, processes[row.peer].failure), flush=True)


def _cells(answers: list[Answer], base: list[Answer], failure: str | None) -> str:
    if not answers or not base:
        return failure or "not compared: hawk_trt did not run"
    line = ""
    for key in COLUMNS:
        times = [getattr(answer, key) for answer in answers]
        ratio = statistics.median(time / getattr(ours, key) for time, ours in zip(times, base, strict=True))
        line += f"{f'{statistics.median(times):,.1f} ({ratio:.2f}x)':>20s}"
    return f"{line}  {'the same' if answers[0].text == base[0].text else 'another'}"


if __name__ == "__main__":
    sys.exit(main())
