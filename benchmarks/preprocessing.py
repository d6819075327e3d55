"""Pre-processing against transformers' own PIL image processors: 30 image sizes and 6 videos a family.

Videos are compared frame by frame, as transformers' video processors need torchvision: each sampled frame of a file
goes through the image processor alone. Out: a row of BENCHMARKS.md a family, the largest differences of any value
after normalisation (0 is equal bit for bit), once with a Pillow that resizes the width first, as versions before 13 do
and as hawk_trt does with any, and once with the Pillow that is installed: `python -m benchmarks.preprocessing`.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.inputs.turns import VisualItem
from hawk_trt.inputs.video import load_video
from hawk_trt.models import load_family
from hawk_trt.models.family import Family
from hawk_trt.models.vision_config import AnyVision

Frame = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]

SIZES = [
    *[(28, 28), (56, 84), (84, 56), (31, 57), (100, 100), (224, 224), (231, 345), (333, 500), (500, 333), (448, 448)],
    *[(480, 640), (640, 480), (600, 1001), (1001, 600), (317, 317), (720, 1280), (1280, 720), (719, 1279), (896, 448)],
    *[(1080, 1920), (1920, 1080), (1008, 1008), (1344, 1792), (100, 1000), (1000, 100), (60, 2000), (999, 1500)],
    *[(1600, 1600), (2160, 3840), (512, 768)],
]
# Height, width, frames, frames a second, codec.
VIDEOS = [
    *[(224, 224, 24, 12, "libx264"), (240, 427, 40, 10, "libx264"), (360, 640, 30, 15, "mpeg4")],
    *[(640, 360, 20, 5, "libx264"), (480, 854, 50, 25, "mpeg2video"), (720, 1280, 16, 4, "libx264")],
]


@dataclass(frozen=True, slots=True)
class Case:
    """A family with its vision sizes, its preprocessor_config.json, and transformers' values of one image."""

    family: Family
    preprocessor: Mapping[str, Any]
    theirs: Callable[[Frame], Values]


def vision_config(family: str, **sizes: object) -> AnyVision:
    """Sizes of a vision tower; those that no image depends on are all 1."""
    others = dict.fromkeys(("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), 1)
    extra = {
        "qwen2_5_vl": {"rope_theta": 1.0, "tokens_per_second": 1.0, "window_size": 1, "fullatt_block_indexes": ()},
        "qwen3_vl": {"rope_theta": 1.0, "num_position_embeddings": 1, "deepstack_visual_indexes": ()},
        "internvl": {"norm": "layer_norm", "layer_norm_eps": 1.0, "qk_norm": False, "qkv_bias": False},
    }[family]
    told = {"family": family, "in_channels": 3, "spatial_merge_size": 2, **others, **extra, **sizes}
    return msgspec.convert(told, AnyVision)


def qwen_case(name: str, patch: int, mean: list[float], std: list[float]) -> Case:
    """Qwen2-VL and Qwen2.5-VL (patches of 14 pixels), or Qwen3-VL (16)."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    side = 2 * patch
    size = {"shortest_edge": 4 * side**2, "longest_edge": 16384 * side**2}
    preprocessor = {"size": size, "patch_size": patch, "image_mean": mean, "image_std": std}
    processor = Qwen2VLImageProcessorPil(**preprocessor)
    vision = vision_config(name, patch_size=patch, temporal_patch_size=2)

    def theirs(image: Frame) -> Values:
        values: Values = processor([Image.fromarray(image)], return_tensors="np")["pixel_values"]
        return values

    return Case(load_family(vision), preprocessor, theirs)


def internvl_case() -> Case:
    """InternVL3: tiles of 448 pixels, and a thumbnail."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    preprocessor = {
        **{"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1, "max_patches": 12},
        **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    }
    processor = GotOcr2ImageProcessorPil(**preprocessor)
    tiles = {"image_size": 448, "min_tiles": 1, "max_tiles": 12, "use_thumbnail": True}
    vision = vision_config("internvl", patch_size=14, temporal_patch_size=1, **tiles)

    def theirs(image: Frame) -> Values:
        return np.stack(list(processor(Image.fromarray(image), return_tensors="np")["pixel_values"]))

    return Case(load_family(vision), preprocessor, theirs)


@contextmanager
def width_first() -> Iterator[None]:
    """Make Pillow resize the width before the height, as all versions before 13 do and as images.resize does."""
    plain = Image.Image.resize

    def two_passes(
        self: Image.Image, size: tuple[int, int], resample: int | None = None, *, reducing_gap: float | None = None
    ) -> Image.Image:
        assert reducing_gap is None  # no processor asks for it
        return plain(plain(self, (size[0], self.height), resample), size, resample)

    with patch.object(Image.Image, "resize", two_passes):
        yield


def compare_images(case: Case) -> tuple[float, int]:
    """The largest difference, and how many sizes are equal bit for bit."""
    settings = case.family.image_settings(case.preprocessor)
    differences = []
    for height, width in SIZES:
        image = np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = np.asarray(case.family.images_to_patches([image], settings).pixel_values)
        expected = case.theirs(image)
        if ours.shape != expected.shape:
            raise SystemExit(f"{case.family.name} {height} x {width}: {ours.shape}, expected {expected.shape}")
        differences.append(float(np.abs(ours - expected).max()))
    return max(differences), differences.count(0.0)


def clips(folder: Path) -> Iterator[Path]:
    """The videos of VIDEOS, written one after another: a square that wanders over noise."""
    for number, (height, width, count, rate, codec) in enumerate(VIDEOS):
        path = folder / f"{number}.{'mpg' if codec == 'mpeg2video' else 'mp4'}"
        noise = np.random.default_rng(number).integers(0, 256, (height, width // 2 * 2, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width, stream.pix_fmt = height, width // 2 * 2, "yuv420p"
            for step in range(count):
                frame = noise.copy()
                frame[20 : height // 2, step * 4 : step * 4 + 60] = (200, 30, 30)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        yield path


def compare_videos(case: Case, files: list[Path]) -> tuple[float, int]:
    """The largest difference, and over how many frames."""
    settings = case.family.image_settings(case.preprocessor)
    worst, frames = 0.0, 0
    tiled = case.family.name == "internvl"
    for file in files:
        video = load_video(VisualItem("video", file), case.family.frame_numbers)
        ours = np.asarray(case.family.video_to_patches(video.frames, settings).pixel_values)
        for number, frame in enumerate(video.frames):
            if tiled:
                mine, expected = ours[number], case.theirs(frame)[-1]  # a frame is what the thumbnail is of an image
            else:
                size = 3 * case.family.vision.patch_size**2
                steps = -(-len(video.frames) // 2)
                by_step = ours.reshape(steps, -1, 3, 2, size // 3)
                mine = by_step[number // 2, :, :, number % 2]
                expected = case.theirs(frame).reshape(-1, 3, 2, size // 3)[:, :, 0]
            worst = max(worst, float(np.abs(mine - expected).max()))
            frames += 1
    return worst, frames


def main() -> None:
    """Print the rows."""
    warnings.filterwarnings("ignore")
    clip_mean, clip_std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    half = [0.5, 0.5, 0.5]
    cases = {
        "Qwen2-VL, Qwen2.5-VL": qwen_case("qwen2_5_vl", 14, clip_mean, clip_std),
        "Qwen3-VL": qwen_case("qwen3_vl", 16, half, half),
        "InternVL3": internvl_case(),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = list(clips(Path(folder)))
        for name, case in cases.items():
            plain, equal = compare_images(case)
            plain_video, frames = compare_videos(case, files)
            with width_first():
                ordered, _ = compare_images(case)
                ordered_video, _ = compare_videos(case, files)
            print(
                f"| {name} | {ordered:g} | {equal} of {len(SIZES)}, {plain:.3f} | {frames} | {ordered_video:g} "
                f"| {plain_video:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
