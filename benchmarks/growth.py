"""How time and memory grow with the size of a request: `make bench-growth`.

A small model with random weights, one thread, ONNX Runtime on the CPU. Four sizes grow, each on its own: tokens of the
prompt, images, tokens of the answer, and columns of the KV cache that nobody writes to. Time is CPU time, which a busy
machine changes little, the least of a few runs; memory is the peak of resident memory (VmHWM) above what was resident
before. Then the operators of a prefill at two sizes, from ONNX Runtime's profiler: which of them grow faster than the
prompt. Out: a CSV, a picture, and tables. A quarter of an hour, 6 GB of memory.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.growth_operators import MIN_SHARE, operator_growth
from benchmarks.growth_picture import draw
from benchmarks.memory_growth import resident_mb
from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.backends import DecodeInputs
from hawk_trt.layout import collate
from hawk_trt.stages import INPLACE, PORTABLE

Image = npt.NDArray[np.uint8]
SIDE = 448  # an image of 256 visual tokens
PROMPTS = (300, 512, 1024, 2048, 4096, 8192, 16384)
IMAGES = (1, 2, 3, 4, 6, 8)
OUTPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLUMNS = (512, 1024, 2048, 4096, 8192, 16384)
_STEPS = 20
_SECONDS = 8.0  # that the runs of one point may take before the last begins
_MOST_RUNS = 7


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        axis: what grows.
        series: keep ratio or profile.
        size: how far it has grown.
        cpu_ms: of one request; of one decode step where the cache grows.
        peak_mb: that it takes above what was resident.
    """

    axis: str
    series: str
    size: int
    cpu_ms: float
    peak_mb: float


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
    """Noise images of 256 tokens each, as many as fit, and words for the rest."""
    special = pipe.bundle.manifest.special_tokens
    rng = np.random.default_rng(0)
    patches, tokens = (SIDE // 14) ** 2, (SIDE // 28) ** 2
    count = max(1, (num_tokens - 32) // (tokens + 2))
    ids = [*[special.vision_start, *[special.image] * tokens, special.vision_end] * count]
    words = rng.integers(0, 400, num_tokens - len(ids)).tolist()
    pixels = rng.standard_normal((count * patches, 1176), dtype=np.float32)
    return ModelInputs(
        np.array(words[:8] + ids + words[8:]), None, pixels, np.array([[1, SIDE // 14, SIDE // 14]] * count)
    )


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """CPU milliseconds, the least of a few runs, and the first one's peak of memory in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew
    before = resident_mb()
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (len(times) < _MOST_RUNS and time.perf_counter() - begun < _SECONDS):
        started = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - started))
        if len(times) == 1:
            peak = resident_mb("VmHWM") - before
    return min(times), peak


def points(bundle: Path) -> Iterator[Point]:
    """All of them, each with sessions of its own, since ONNX Runtime keeps what a run took."""

    def fresh(profile: str = INPLACE, vision_cache_mb: float = 0) -> Pipeline:
        return Pipeline.load(bundle, profile=profile, vision_cache_mb=vision_cache_mb, threads=1)

    for keep_ratio in (1.0, 0.2):
        for size in PROMPTS:
            with fresh(vision_cache_mb=1024) as pipe:
                inputs = prompt(pipe, size)
                pipe.encode([inputs], [pipe.layout(inputs)])  # the vision stage has an axis of its own
                ask = _asks(pipe, inputs, keep_ratio, 1)
                yield Point("prompt", f"{keep_ratio:.0%} kept", size, *measure(ask))
    for count in IMAGES:
        with fresh() as pipe:
            images = [np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for n in range(count)]
            pipe.generate("Why?", images[:1], max_new_tokens=1)
            yield Point("images", "20% kept", count, *measure(_asks(pipe, "Why?", 0.2, 1, images)))
    for profile in (INPLACE, PORTABLE):
        for size in OUTPUTS:
            with fresh(profile, vision_cache_mb=64) as pipe:
                inputs = prompt(pipe, 300)
                pipe.encode([inputs], [pipe.layout(inputs)])
                yield Point("output", profile, size, *measure(_asks(pipe, inputs, 0.2, size)))
    for columns in COLUMNS:
        with fresh() as pipe:
            step = _steps(pipe, columns)
            cpu_ms, peak_mb = measure(step)
            yield Point("cache", INPLACE, columns, cpu_ms / _STEPS, peak_mb)


def _asks(
    pipe: Pipeline, asked: str | ModelInputs, keep_ratio: float, max_new_tokens: int, images: Sequence[Image] = ()
) -> Callable[[], object]:
    pruning = PruningConfig(keep_ratio)
    return lambda: pipe.generate(asked, images, pruning=pruning, max_new_tokens=max_new_tokens, ignore_eos=True)


def _steps(pipe: Pipeline, columns: int) -> Callable[[], object]:
    """Decode steps, always over the same 300 tokens, in a cache of so many columns."""
    inputs = prompt(pipe, 300)
    layout = pipe.layout(inputs)
    heads = np.array(pipe.bundle.manifest.head_weights.values, np.float32)
    generation = pipe.backend.start(1, columns)
    generation.prefill(
        collate([layout], [layout.num_visual], [None], heads), pipe.encode([inputs], [layout]), logits=False
    )
    token, position = np.array([1]), np.array([layout.next_position])

    def run() -> None:
        for _ in range(_STEPS):
            generation.decode(DecodeInputs(token, position), logits=False)

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
    args = parser.parse_args()
    bundle = make_bundle(args.model)
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points(bundle):
        found.setdefault((point.axis, point.series), []).append(point)
        print(
            f"{point.axis} {point.series} {point.size}: {point.cpu_ms:.1f} ms, {point.peak_mb:.1f} MB", file=sys.stderr
        )
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Point))
        writer.writerows(
            (*astuple(point)[:3], f"{point.cpu_ms:.3f}", f"{point.peak_mb:.2f}")
            for row in found.values()
            for point in row
        )
    draw(found, args.picture)

    print(
        f"one thread, {load()}; CPU time is the least of up to {_MOST_RUNS} runs, memory is VmHWM above what was there"
    )
    print(f"{'':26s}{'smallest':>28s}{'largest':>30s}{'exponent of the last step':>28s}")
    for (axis, series), row in found.items():
        cells = "".join(f"{f'{p.size:,}: {p.cpu_ms:,.1f} ms, {p.peak_mb:,.1f} MB':>30s}" for p in (row[0], row[-1]))
        print(f"{f'{axis}, {series}':24s}{cells}{exponent(row[-2], row[-1], 'cpu_ms'):>20.2f}")
    small, large = 4096, 8192
    with Pipeline.load(bundle, profile=INPLACE, vision_cache_mb=1024, threads=1) as pipe:
        growth = operator_growth(pipe, prompt(pipe, small), prompt(pipe, large))
    print(f"\noperators of an unpruned prefill, {small:,} against {large:,} tokens; each of {MIN_SHARE:.0%} or more")
    for one in growth:
        print(f"{one.name:28s}{one.share:>8.1%}{one.exponent:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
