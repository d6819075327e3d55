"""How time and memory grow with the size of a request: `make bench-growth`.

A small model with random weights, one thread, ONNX Runtime on the CPU. Four sizes grow, each on its own: tokens of the
prompt, images, tokens of the answer, and columns of the KV cache that nobody writes to. Every point has a process of
its own. Time is CPU time, which a busy machine changes little, the least of a few runs; memory is the peak of resident
memory (VmHWM) while the first of them ran, weights and interpreter included. Then the operators of a prefill at two
sizes, from ONNX Runtime's profiler: which of them grow faster than the prompt. Out: a CSV, a picture, and tables. Ten
minutes; the largest point takes 6 GB of memory, and is left out where that is not free.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.growth_operators import MIN_SHARE, operator_growth
from benchmarks.growth_picture import draw
from benchmarks.memory_growth import resident_mb
from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.inputs.layout import collate
from hawk_trt.runtime.versions import available_memory_bytes
from hawk_trt.stages import CPU, PORTABLE, TARGETS

Image = npt.NDArray[np.uint8]
SIDE = 448  # an image of 256 visual tokens
ALL = "all kept"
# What grows, the series of each axis, and its sizes.
AXES = (
    ("prompt", (ALL, "20 % kept"), (300, 512, 1024, 2048, 4096, 8192, 16384)),
    ("images", ("20 % kept",), (1, 2, 3, 4, 6, 8)),
    ("output", (CPU, PORTABLE), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    ("cache", (CPU,), (512, 1024, 2048, 4096, 8192, 16384)),
)
OPERATOR_SIZES = (4096, 8192)
_KEPT = 0.2
_SHORT_PROMPT = 300
_STEPS = 20
_SECONDS = 8.0  # that the runs of one point may take before the last begins
_MOST_RUNS = 7  # and two at least: the first finds no memory
_SMALL_MB = 3000.0  # below it nobody looks whether so much is free


@dataclass(frozen=True)
class Point:
    """One measurement."""

    axis: str  # what grows
    series: str  # share of the visual tokens kept, or target
    size: int  # how far it has grown
    cpu_ms: float  # of one request; of one decode step where the cache grows
    peak_mb: float  # resident in its process, at most


def make_bundle(folder: Path) -> Path:
    """Two heads of the real head size, so that the scores of 16,384 tokens against each other fit in memory."""
    config = cut_config("qwen2.5-vl-3b", layers=3, vision_layers=2)
    config["text_config"] |= {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    }
    config["vision_config"] |= {"hidden_size": 160, "intermediate_size": 320, "num_heads": 2, "out_hidden_size": 256}
    return make_model(folder, config)[1]


def prompt(pipe: Pipeline, num_tokens: int) -> ModelInputs:
    """Noise images of 256 tokens each, as many as fit, and words for the rest; the images are encoded already."""
    special = pipe.bundle.manifest.special_tokens
    rng = np.random.default_rng(0)
    rows, tokens = SIDE // 14, (SIDE // 28) ** 2
    count = max(1, (num_tokens - 32) // (tokens + 2))
    ids = [special.vision_start, *[special.image] * tokens, special.vision_end] * count
    words = rng.integers(0, 400, num_tokens - len(ids)).tolist()
    pixels = rng.standard_normal((count * rows**2, 1176), dtype=np.float32)
    inputs = ModelInputs(np.array(words[:8] + ids + words[8:]), None, pixels, np.array([[1, rows, rows]] * count))
    pipe.vision_cache.encode([(inputs, pipe.processor.layout(inputs))])[0]
    return inputs


def measure(bundle: Path, axis: str, series: str, size: int) -> Point:
    """One point, in this process."""
    target = series if series in TARGETS else CPU
    per_run = 1
    with Pipeline.load(bundle, target=target, vision_cache_mb=0 if axis == "images" else 1024, threads=1) as pipe:
        if axis == "prompt":
            run = _asks(pipe, prompt(pipe, size), 1.0 if series == ALL else _KEPT, 1)
        elif axis == "output":
            run = _asks(pipe, prompt(pipe, _SHORT_PROMPT), _KEPT, size)
        elif axis == "images":
            images = [np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for n in range(size)]
            run = _asks(pipe, "Why?", _KEPT, 1, images)
        else:
            run, per_run = _steps(pipe, size), _STEPS
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 2 or (len(times) < _MOST_RUNS and time.perf_counter() - begun < _SECONDS):
            started = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - started) / per_run)
            if len(times) == 1:
                peak = resident_mb("VmHWM")
    return Point(axis, series, size, min(times), peak)


def measure_all(model: Path) -> dict[tuple[str, str], list[Point]]:
    """All points by axis and series, each measured in a process of its own."""
    found: dict[tuple[str, str], list[Point]] = {}
    for axis, series, sizes in ((axis, series, sizes) for axis, all_series, sizes in AXES for series in all_series):
        row = found[axis, series] = []
        for size in sizes:
            # the scores of all tokens against each other grow with the square of their number
            free_mb = (available_memory_bytes() or 0) / 2**20
            if row and row[-1].peak_mb * (size / row[-1].size) ** 2 > max(free_mb, _SMALL_MB):
                print(f"{axis}, {series}, {size}: left out, {free_mb:,.0f} MB are free", file=sys.stderr)
                break
            command = [sys.executable, "-m", "benchmarks.growth", "--model", str(model)]
            command += ["--point", axis, series, str(size)]
            row.append(Point(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)))
            print(*astuple(row[-1]), sep=", ", file=sys.stderr)
    return found


def _asks(
    pipe: Pipeline, asked: str | ModelInputs, keep_ratio: float, max_new_tokens: int, images: Sequence[Image] = ()
) -> Callable[[], object]:
    pruning = PruningConfig(keep_ratio)
    return lambda: pipe.generate(asked, images, pruning=pruning, max_new_tokens=max_new_tokens, ignore_eos=True)


def _steps(pipe: Pipeline, columns: int) -> Callable[[], object]:
    """Decode steps behind the short prompt, in a cache of so many columns; every run starts anew."""
    inputs = prompt(pipe, _SHORT_PROMPT)
    layout = pipe.processor.layout(inputs)
    heads = np.array(pipe.bundle.manifest.head_weights.values, np.float32)
    prefill = collate([layout], [layout.num_visual], [None], heads)
    visual, _ = pipe.vision_cache.encode([(inputs, layout)])
    rows = pipe.backend.prefill(prefill, visual, columns, logits=False).rows
    token, position = np.array([1]), np.array([layout.next_position])

    def run() -> None:
        for _ in range(_STEPS):
            pipe.backend.decode(rows, token, position, logits=False)

    run()
    return run


def exponent(low: Point, high: Point, name: str) -> float:
    """Of a power law through two points: 1 is linear, 2 quadratic."""
    return float(np.log(getattr(high, name) / getattr(low, name)) / np.log(high.size / low.size))


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("artifacts/growth"), help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("docs/growth.csv"), help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("docs/growth.png"), help="(default: %(default)s)")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    bundle = make_bundle(args.model)
    if args.point:
        axis, series, size = args.point
        print(json.dumps(asdict(measure(bundle, axis, series, int(size)))))
        return 0
    found = measure_all(args.model)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Point))
        for point in (point for row in found.values() for point in row):
            writer.writerow((*astuple(point)[:3], f"{point.cpu_ms:.2f}", f"{point.peak_mb:.1f}"))
    draw(found, args.picture)

    print(f"one thread, {load()}; CPU time is the least of up to {_MOST_RUNS} runs, memory is VmHWM")
    print(f"{'':22s}{'smallest':>30s}{'largest':>34s}   exponents of the last step: time, memory")
    for (axis, series), row in found.items():
        cells = [f"{point.size:,}: {point.cpu_ms:,.1f} ms, {point.peak_mb:,.0f} MB" for point in (row[0], row[-1])]
        powers = "".join(f"{exponent(row[-2], row[-1], name):8.2f}" for name in ("cpu_ms", "peak_mb"))
        print(f"{f'{axis}, {series}':22s}{cells[0]:>30s}{cells[1]:>34s}{powers}")
    small, large = OPERATOR_SIZES
    print(
        f"\noperators of an unpruned prefill of {small:,} and {large:,} tokens, from {MIN_SHARE:.1%}: share, exponent"
    )
    with Pipeline.load(bundle, target=CPU, vision_cache_mb=1024, threads=1) as pipe:
        for one in operator_growth(pipe, prompt(pipe, small), prompt(pipe, large)):
            print(f"{one.name:28s}{one.share:>8.1%}{one.exponent:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
