"""`hawk-trt bench`: time by stage and memory, pruned and not, of a bundle or of engines on this machine."""

import argparse
import platform
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from hawk_trt import __version__
from hawk_trt.apps.bench.bench import MEMORY_METRIC, BenchPrompt, BenchRow, bench
from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.doctor_checks import installed_version
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.cli.progress import progress
from hawk_trt.errors import InvalidInput
from hawk_trt.files import write_atomically
from hawk_trt.request import ModelInputs

if TYPE_CHECKING:
    from hawk_trt import Pipeline

SUMMARY = "measure time by stage and memory, at several keep ratios and prompt sizes"
_QUESTION = "What is in this picture? Describe the most important things."


@dataclass(frozen=True, slots=True)
class _Report:
    bundle: str
    dtype: str
    backend: str
    device: str
    target: str
    machine: str
    versions: dict[str, str]
    repeats: int
    warmup: int
    max_new_tokens: int
    memory_metric: str
    rows: list[BenchRow]


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "bench", SUMMARY)
    options.add_pipeline_options(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--image", action="append", default=[], help="an image to ask about; repeatable")
    group.add_argument("--prompt", default=_QUESTION, help="the question (default: %(default)r)")
    group.add_argument(
        "--sides",
        type=options.numbers,
        metavar="N,N,...",
        help="square noise images of these sides in pixels instead (default: 448, where no image is given)",
    )
    group.add_argument("--text-tokens", type=int, default=32, help="where there is no tokenizer (default: %(default)s)")
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--keep-ratios", type=options.numbers, default="1,0.4,0.2,0.1", metavar="R,R,...", help="(default: %(default)s)"
    )
    group.add_argument("--max-new-tokens", type=int, default=16, help="generated in each run (default: %(default)s)")
    group.add_argument("--repeats", type=int, default=7, help="timed runs of each pair (default: %(default)s)")
    group.add_argument("--warmup", type=int, default=2, help="runs before them (default: %(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--plot", type=Path, metavar="PNG", help="draw stacked stage times by keep ratio")
    group.add_argument("--json", action="store_true", help="print the measurements as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure.

    Raises:
        HawkError: something that cannot be measured as asked for.
    """
    with options.open_pipeline(args) as pipe:
        prompts = _prompts(args, pipe)
        runs = (args.warmup + args.repeats) * len(prompts) * len(args.keep_ratios)
        ticks = iter(progress(range(runs), runs, "runs"))
        rows = bench(
            pipe,
            prompts,
            args.keep_ratios,
            max_new_tokens=args.max_new_tokens,
            repeats=args.repeats,
            warmup=args.warmup,
            step=partial(next, ticks, None),
        )
        next(ticks, None)  # the bar ends with its last item
        report = _Report(
            bundle=str(args.bundle),
            dtype=pipe.bundle.manifest.precision,
            backend=pipe.backend.name,
            device=pipe.backend.device,
            target=pipe.backend.target,
            machine=f"{platform.machine()}, {_cpu_name()}",
            versions={"python": platform.python_version(), "hawk_trt": __version__, pipe.backend.name: _runtime(pipe)},
            repeats=args.repeats,
            warmup=args.warmup,
            max_new_tokens=args.max_new_tokens,
            memory_metric=MEMORY_METRIC,
            rows=rows,
        )
    if args.json:
        print_json(report)
    else:
        from hawk_trt.apps.bench.report import print_rows

        console = Console(width=None if sys.stdout.isatty() else 160)
        print_rows(rows, console)
        console.print(f"{report.dtype}, {report.target}, {report.backend} on {report.device}; peak: {MEMORY_METRIC}")
    if args.plot is not None:
        from hawk_trt.apps.bench.report import plot_rows

        write_atomically(args.plot, plot_rows(rows))
        note(f"plot           {args.plot}")
    return 0


def _prompts(args: argparse.Namespace, pipe: "Pipeline") -> list[BenchPrompt]:
    sides = [int(side) for side in args.sides or ([] if args.image else [448])]
    prompts = [BenchPrompt(Path(image).name, partial(pipe.prepare, args.prompt, [image])) for image in args.image]
    for side in sides:
        if side < 28:
            raise InvalidInput(f"--sides: got {side}, expected pixels, at least 28")
        prompts.append(_noise_prompt(args, pipe, side))
    return prompts


def _noise_prompt(args: argparse.Namespace, pipe: "Pipeline", side: int) -> BenchPrompt:
    """A noise image as a prompt; without a tokenizer its tensors, random ids around placeholders."""
    rng = np.random.default_rng(side)
    name = f"{side} x {side} px"
    if "tokenizer.json" in pipe.bundle.manifest.files and "preprocessor_config.json" in pipe.bundle.manifest.files:
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        area = side * side
        return BenchPrompt(name, partial(pipe.prepare, args.prompt, [image], min_pixels=area, max_pixels=area))
    inputs = _tensors(pipe, rng, side, args.text_tokens)
    return BenchPrompt(name, lambda: inputs)


def _tensors(pipe: "Pipeline", rng: np.random.Generator, side: int, text_tokens: int) -> ModelInputs:
    manifest = pipe.bundle.manifest
    vision, special = manifest.vision, manifest.special_tokens
    rows = max(side // vision.token_side, 1) * vision.spatial_merge_size
    text = rng.integers(0, min(special.image or 100, 100), text_tokens)
    around = [token for token in (special.vision_start,) if token is not None]
    image = [special.image] * ((rows // vision.spatial_merge_size) ** 2)
    ids = [*text[:4], *around, *image, *([special.vision_end] if special.vision_end is not None else []), *text[4:]]
    return ModelInputs(
        input_ids=np.array(ids, np.int64),
        pixel_values=rng.standard_normal((rows * rows, vision.patch_dim), dtype=np.float32),
        image_grid_thw=np.array([[1, rows, rows]]),
    )


def _runtime(pipe: "Pipeline") -> str:
    """The version of what runs the stages."""
    found = installed_version(pipe.backend.name) or installed_version(f"{pipe.backend.name}-gpu")
    return found or "unknown"


def _cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
