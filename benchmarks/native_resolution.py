"""Time and peak memory of one image at native resolution, at the real width of the 7B: `make bench-native`.

A random checkpoint has Qwen2.5-VL-7B's vision tower, cut to so many blocks (the last one attends over the whole
image), and two language layers of the 7B's width. An image of SIDE x SIDE pixels goes through preprocessing, vision and
first_layer in ONNX Runtime on the CPU, float32, in a process of its own. 3,584 pixels make 65,536 patches and 16,384
visual tokens, the most that native resolution allows. Out: a table, and exit 1 where the peak passes the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.memory_growth import resident_mb
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.stages import TARGETS
from tests.checkpoints import Sizes, make_checkpoint, random_tensors

ROOT = Path(__file__).parent.parent
MAX_PIXELS = 16384 * 28 * 28
TEXT = 32


def tower_sizes(depth: int) -> Sizes:
    """The 7B's tower of so many blocks, every eighth and the last with full attention, over two language layers."""
    full = tuple(block for block in range(depth) if block % 8 == 7 or block == depth - 1)
    return Sizes(3584, 256, 2, 28, 4, 320, 1280, 3420, depth, 16, full)


def make_bundle(folder: Path, depth: int, target: str) -> Path:
    """A random checkpoint of these sizes, exported."""
    sizes = tower_sizes(depth)
    checkpoint = make_checkpoint(folder / "checkpoint", random_tensors(sizes, scale=0.02), sizes=sizes)
    command = [sys.executable, "-m", "export", str(checkpoint), "--out", str(folder / "bundle"), "--target", target]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / "bundle"


def measure(bundle: Path, side: int, target: str, keep_ratio: float) -> dict[str, float]:
    """One image through the stages, in this process."""
    result: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        result[f"{name}_seconds"] = time.perf_counter() - started
        result[f"{name}_peak_gb"] = resident_mb("VmHWM") * 2**20 / 1e9

    with step("load"):
        pipe = Pipeline.load(bundle, target=target)
    vision, special = pipe.bundle.manifest.vision, pipe.bundle.manifest.special_tokens
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with step("preprocess"):
        settings = pipe.family.image_settings({"min_pixels": 3136, "max_pixels": MAX_PIXELS})
        patches = pipe.family.images_to_patches([image], settings)
    num_patches = len(patches.pixel_values)
    num_visual = num_patches // vision.spatial_merge_size**2
    words = list(range(10, 10 + TEXT))
    ids = [3, special.vision_start, *[special.image] * num_visual, special.vision_end, *words]
    inputs = ModelInputs(input_ids=ids, pixel_values=patches.pixel_values, image_grid_thw=patches.grid_thw)
    del patches
    with step("generate"):
        answer = pipe.generate(inputs, pruning=PruningConfig(keep_ratio), max_new_tokens=2, ignore_eos=True)
    if answer.num_visual != num_visual or not np.isfinite(answer.scores).all():
        raise SystemExit(f"error: {answer.num_visual} visual tokens, expected {num_visual} with finite scores")
    return {
        "patches": num_patches,
        "visual_tokens": num_visual,
        "kept": answer.num_kept,
        **result,
        "vision_seconds": answer.timings.vision,
        "first_layer_seconds": answer.timings.first_layer,
        "peak_gb": resident_mb("VmHWM") * 2**20 / 1e9,
    }


def main() -> int:
    """Measure each side in a process of its own and print; returns 1 where the peak passes the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[896, 1792, 3584], help="of the image, in pixels")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the tower, 32 in the 7B (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="default: %(default)s")
    parser.add_argument("--keep-ratio", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--max-gb", type=float, default=8.0, help="peak memory allowed (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("artifacts"), help="where the files go for the time being")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a side")
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)  # how this program calls itself
    args = parser.parse_args()
    if args.bundle is not None:
        print(json.dumps(measure(args.bundle, args.side[0], args.target, args.keep_ratio)))
        return 0
    args.dir.mkdir(parents=True, exist_ok=True)
    met = True
    with tempfile.TemporaryDirectory(prefix="native-", dir=args.dir) as folder:
        bundle = make_bundle(Path(folder), args.depth, args.target)
        for side in args.side:
            command = [sys.executable, "-m", "benchmarks.native_resolution", "--bundle", str(bundle.resolve())]
            command += ["--side", str(side), "--target", args.target, "--keep-ratio", str(args.keep_ratio)]
            done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
            result = json.loads(done.stdout)
            met = met and result["peak_gb"] <= args.max_gb
            if args.json:
                print(json.dumps(result), flush=True)
                continue
            print(f"{side} x {side} pixels, {args.depth} blocks, {args.target}")
            for name, value in result.items():
                print(f"  {name:24s} {value:12,.2f}", flush=True)
    print("within the limit" if met else f"beyond the limit of {args.max_gb:g} GB", file=sys.stderr)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
