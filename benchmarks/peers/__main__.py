"""Peers beside hawk_trt on the same weights, image, prompt and number of threads: `make bench-peers`.

Each runs in a process and an environment of its own (`make peers` makes them), all of them at the same time, and they
answer in turn, round by round. Out: versions, a table of medians, how many times longer each takes than hawk_trt with
as many tokens kept, and the peak memory of each process. A peer that cannot run is a row that says why. On a busy
machine look at the CPU time, with one thread.
"""

import argparse
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers.environments import PLACE
from benchmarks.peers.process import PEERS, Process, Setting
from benchmarks.peers.worker import Answer, Ask
from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load
from export.writer import ExportOptions, export
from hawk_trt import Pipeline

PROMPT = "What is in this picture?"
COLUMNS = {"first_token_ms": "first token", "token_ms": "a later token", "total_ms": "in all", "cpu_ms": "CPU time"}
_WARM_UP = 2  # the second still compiles, for a cache of another length


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what it is called.
        peer: who answers.
        base: the row that it is held against.
        keep_ratio: of the visual tokens.
        text: ask a prompt of text alone.
    """

    title: str
    peer: str
    base: str
    keep_ratio: float = 1.0
    text: bool = False


ROWS = (
    Row("hawk_trt", "hawk_trt", "hawk_trt"),
    Row("transformers", "transformers", "hawk_trt"),
    Row("transformers, compiled", "transformers, compiled", "hawk_trt"),
    Row("OpenVINO GenAI", "OpenVINO GenAI", "hawk_trt"),
    Row("hawk_trt, 20 %", "hawk_trt", "hawk_trt, 20 %", 0.2),
    Row("transformers with HAWK, 20 %", "transformers", "hawk_trt, 20 %", 0.2),
    Row("OpenVINO GenAI, CDPruner, 20 %", "OpenVINO GenAI", "hawk_trt, 20 %", 0.2),
    Row("hawk_trt, text alone", "hawk_trt", "hawk_trt, text alone", text=True),
    Row("onnxruntime-genai, text alone", "onnxruntime-genai", "hawk_trt, text alone", text=True),
)


def prepare(args: argparse.Namespace) -> tuple[Setting, list[int]]:
    """What all peers get, and the tokens of a text as long as the prompt."""
    if args.checkpoint is None:
        models = args.out / f"3b-{args.layers}-layers"
        make_model(models, cut_config("qwen2.5-vl-3b", args.layers, vision_layers=2))
    else:
        models = args.out / args.checkpoint.resolve().name
        models.mkdir(parents=True, exist_ok=True)
        if not (models / "checkpoint").exists():
            (models / "checkpoint").symlink_to(args.checkpoint.resolve())
        export(args.checkpoint, models / "bundle", ExportOptions())
    image = args.image
    if image is None:
        image = models / f"noise-{args.side}.png"
        noise = np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
    with Pipeline.load(models / "bundle") as pipe:
        num_tokens = np.size(pipe.prepare(PROMPT, [image]).input_ids)
    text_ids = np.random.default_rng(0).integers(0, 400, num_tokens).tolist()
    return Setting(models, args.environments.absolute(), image, PROMPT, args.threads), text_ids


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="(default: random weights of the 3B's width)")
    parser.add_argument("--layers", type=int, default=3, help="of random weights (default: %(default)s)")
    parser.add_argument("--image", type=Path, help="(default: noise)")
    parser.add_argument("--side", type=int, default=560, help="of the noise, in pixels (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after two to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each peer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PLACE / "models", help="(default: %(default)s)")
    parser.add_argument("--environments", type=Path, default=PLACE, help="(default: %(default)s)")
    args = parser.parse_args()
    args.out, args.image = args.out.absolute(), args.image and args.image.absolute()
    setting, text_ids = prepare(args)
    processes = {peer.name: Process(peer, setting) for peer in PEERS}
    answers: dict[str, list[Answer]] = {row.title: [] for row in ROWS}
    for number in range(_WARM_UP + args.rounds):
        for row in ROWS:
            ask = Ask(row.keep_ratio, args.max_new_tokens, text_ids if row.text else None)
            answer = processes[row.peer].ask(ask)
            if answer is not None and number >= _WARM_UP:
                answers[row.title].append(answer)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name, process in processes.items():
        versions = ", ".join(f"{package} {version}" for package, version in process.versions.items())
        print(f"{name}: {process.failure or versions}; peak resident memory (VmHWM) {process.stop():,.0f} MB")
    print(f"{len(text_ids)} tokens, {args.threads} threads, {load()}, medians of {args.rounds} rounds")
    print(
        f"ms for {args.max_new_tokens} tokens; in brackets how many times as long as hawk_trt with as many tokens kept"
    )
    print(f"{'':32s}" + "".join(f"{head:>20s}" for head in COLUMNS.values()) + "  answer")
    for row in ROWS:
        print(f"{row.title:32s}" + _cells(answers[row.title], answers[row.base], processes[row.peer].failure))
    return int(not answers["hawk_trt"])


def _cells(answers: list[Answer], base: list[Answer], failure: str | None) -> str:
    if not answers or not base:
        return failure or "not compared: hawk_trt did not run"
    line = ""
    for key in COLUMNS:
        times = [getattr(answer, key) for answer in answers]
        ratio = statistics.median(time / getattr(ours, key) for time, ours in zip(times, base, strict=True))
        line += f"{f'{statistics.median(times):,.1f} ({ratio:.2f}x)':>20s}"
    text, ours = answers[0].text, base[0].text
    return f"{line}  {'-' if not text + ours else 'the same' if text == ours else 'another'}"


if __name__ == "__main__":
    sys.exit(main())
