"""Patches of the Qwen vision towers: which frames of a video, how large, how they are cut, and a frame size at a time.

A patch is a row of [channel, temporal patch, patch, patch]. Patches lie in the order of the checkpoint's own processor:
frame by frame, in a frame by merge block (the m x m patches that become one token follow each other), blocks in raster
order. An image fills its temporal patch with itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.family import ImageSettings, IntArray, Patches
from hawk_trt.models.qwen_positions import check_grid
from hawk_trt.models.vision_config import Qwen2Vision

MAX_ASPECT_RATIO = 200
# How the Qwen2-VL processor samples a file: frames a second, and how many of them.
DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MULTIPLE = 2
PLANS_KEPT = 16  # of the last frame sizes

# What Qwen's processors leave of the context for text, and by how much frames may always pass their least area.
_SHARE_OF_CONTEXT = 0.9
_OVER_LEAST = 1.05


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width nearest to the given ones that are multiples of factor and within the pixel bounds.

    Raises:
        InvalidInput: a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidInput(
            f"image: got {width} x {height} pixels, expected sides of at most 1 to {MAX_ASPECT_RATIO}. Crop it"
        )
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        return shrunk(height, width, factor, math.sqrt(height * width / max_pixels))
    if tall * wide < min_pixels:
        return grown(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return tall, wide


def shrunk(height: int, width: int, factor: int, by: float) -> tuple[int, int]:
    """Height and width divided by a number, down to multiples of factor, at least one."""
    return (
        max(factor, math.floor(height / by / factor) * factor),
        max(factor, math.floor(width / by / factor) * factor),
    )


def grown(height: int, width: int, factor: int, by: float) -> tuple[int, int]:
    """Height and width times a number, up to multiples of factor."""
    return math.ceil(height * by / factor) * factor, math.ceil(width * by / factor) * factor


def sample_indices(total: int, video_fps: float, fps: float | None, max_frames: int = MAX_FRAMES) -> IntArray:
    """Which frames of a file are taken: evenly spaced, an even number of them (one of a single frame).

    Args:
        total: frames of the file.
        video_fps: its frames a second.
        fps: frames a second wanted, None is 2; at least 4 frames are taken, where there are so many.
        max_frames: taken at most.

    Returns:
        int64 [frames], ascending.
    """
    rate = DEFAULT_FPS if fps is None else fps
    wanted = min(max(total / video_fps * rate, MIN_FRAMES), max_frames, total)
    count = max(math.floor(wanted / FRAME_MULTIPLE) * FRAME_MULTIPLE, 1)
    # The processor's own arithmetic: float32 steps, truncated.
    return (np.arange(count) * (total / count)).astype(np.float32).astype(np.int64)


def max_frame_pixels(num_frames: int, settings: ImageSettings, vision: Qwen2Vision) -> int:
    """The largest area of a resized frame: the settings', or less where many frames share the context.

        share = floor(0.9 * max_video_tokens * (patch_size * merge)^2) * temporal_patch_size / num_frames

    It is the rule of the Qwen2-VL video processor's cap_pixels_per_frame.
    """
    if settings.max_video_tokens is None:
        return settings.max_pixels
    total = int(settings.max_video_tokens * vision.token_side**2 * _SHARE_OF_CONTEXT)
    total = min(total, settings.total_pixels or total)
    share = max(total * vision.temporal_patch_size // num_frames, int(settings.min_pixels * _OVER_LEAST))
    return min(settings.max_pixels, share)


def cut(
    image: npt.NDArray[np.uint8],
    tables: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    vision: Qwen2Vision,
    places: slice,
) -> None:
    """Write the normalised patches of one resized image into rows [num_patches, patch_dim].

    tables: see value_tables.  places: the places in the temporal patch that the image takes.
    """
    merge, patch, together = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    high, wide = image.shape[0] // vision.token_side, image.shape[1] // vision.token_side
    blocks = image.reshape(high, merge, patch, wide, merge, patch, 3).transpose(6, 0, 3, 1, 4, 2, 5)
    out = rows.reshape(high, wide, merge, merge, 3, together, patch, patch)
    for channel, table in enumerate(tables):
        out[:, :, :, :, channel, places] = table[blocks[channel]][:, :, :, :, None]


@lru_cache(maxsize=PLANS_KEPT)
def patch_positions(height: int, width: int, merge: int) -> IntArray:
    """Row and column of each patch of a frame, in the processor's order: int64 [num_patches, 2], read-only.

    height and width are in patches.
    """
    rows, columns = np.mgrid[:height, :width]
    positions = np.stack((rows, columns), axis=-1).astype(np.int64)
    by_block = positions.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    flat: IntArray = by_block.reshape(-1, 2)
    flat.flags.writeable = False  # shared by every call with this size
    return flat


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Successive frames of one size.

    Attributes:
        pixel_values: float32 [num_frames, num_patches, patch_dim].
        height: of each frame, in patches.
        width: of each frame, in patches.
    """

    pixel_values: npt.NDArray[np.float32]
    height: int
    width: int


def frame_batches(patches: Patches, vision: Qwen2Vision, max_patches: int) -> Iterator[FrameBatch]:
    """Cut images and videos into batches of frames of one size, in order.

    max_patches: of one batch; a single frame may exceed it.

    Raises:
        InvalidInput: pixel_values and grid_thw do not fit each other, or not the model.
    """
    grid = check_grid("grid_thw", patches.grid_thw, vision.spatial_merge_size)
    pixels, dim, num_rows = patches.pixel_values, vision.patch_dim, int(grid.prod(axis=1).sum())
    got = f"pixel_values: got {pixels.dtype}{list(pixels.shape)}, expected"
    if pixels.ndim != 2 or pixels.shape[1] != dim or not np.issubdtype(pixels.dtype, np.floating):
        raise InvalidInput(f"{got} float32[num_patches, {dim}]")
    if len(pixels) != num_rows:
        raise InvalidInput(f"{got} {num_rows} rows for grid_thw {grid.tolist()}")
    return _batches(pixels, grid, max_patches)  # a generator of its own: errors come at the call


def _batches(pixels: npt.NDArray[np.float32] | StreamedRows, grid: IntArray, max_patches: int) -> Iterator[FrameBatch]:
    runs: list[tuple[int, int, int]] = []  # frames, height, width; items of equal size that follow each other joined
    for frames, height, width in grid.tolist():
        if runs and runs[-1][1:] == (height, width):
            frames += runs.pop()[0]
        runs.append((frames, height, width))
    start = 0
    for frames, height, width in runs:
        num_patches = height * width
        frames_a_batch = max(1, max_patches // num_patches)
        for first in range(0, frames, frames_a_batch):
            count = min(frames_a_batch, frames - first)
            rows = pixels[start : start + count * num_patches].astype(np.float32, copy=False)
            start += count * num_patches
            yield FrameBatch(rows.reshape(count, num_patches, -1), height, width)
