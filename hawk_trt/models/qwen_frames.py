"""Frames of one size at a time, as the Qwen vision stages take them, and where the patches of a frame lie.

Enters: patches and the grid (time, height, width) of each image or video. Leaves: batches of frames of one size, and
for towers without windows the feeds of the vision stage. Patches stay in the processor's order: by merge block (the
m x m patches that become one token follow each other), blocks in raster order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.family import IntArray, Patches
from hawk_trt.models.qwen_positions import check_grid
from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import TensorSpec

_PLANS_KEPT = 16


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


def frame_batches(patches: Patches, vision: VisionConfig, max_patches: int) -> Iterator[FrameBatch]:
    """Cut images and videos into batches of frames, in order.

    Args:
        patches: rows in the processor's order, and the grid of each image or video.
        vision: sizes of the vision tower.
        max_patches: of one batch; consecutive frames of one size share it. A single frame may exceed it.

    Raises:
        InvalidInput: pixel_values and grid_thw do not fit each other, or not the model.
    """
    grid = check_grid("grid_thw", patches.grid_thw, vision.spatial_merge_size)
    _check_pixels(patches.pixel_values, grid, vision.patch_dim)
    return _batches(patches.pixel_values, grid, max_patches)  # a generator of its own: errors come at the call


@lru_cache(maxsize=_PLANS_KEPT)
def patch_positions(height: int, width: int, merge: int) -> IntArray:
    """Row and column of each patch of a frame, in the processor's order: int64 [num_patches, 2], read-only."""
    rows, columns = np.mgrid[:height, :width]
    positions = np.stack((rows, columns), axis=-1).astype(np.int64)
    by_block = positions.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    flat: IntArray = by_block.reshape(-1, 2)
    flat.flags.writeable = False  # shared by every call with this size
    return flat


def frame_inputs(vision: VisionConfig) -> tuple[TensorSpec, ...]:
    """Inputs of a vision graph without windows.

    num_visual = num_frames * num_patches / merge^2, frames in order, merge blocks of a frame in raster order.
    """
    return (
        TensorSpec("pixel_values", "float32", ("num_frames", "num_patches", vision.patch_dim)),
        TensorSpec("patch_positions", "int64", ("num_patches", 2)),
    )


def frame_feeds(batch: FrameBatch, vision: VisionConfig) -> dict[str, npt.NDArray[Any]]:
    """The feeds of frame_inputs for one batch."""
    positions = patch_positions(batch.height, batch.width, vision.spatial_merge_size)
    return {"pixel_values": batch.pixel_values, "patch_positions": positions}


def _batches(pixels: npt.NDArray[np.float32] | StreamedRows, grid: IntArray, max_patches: int) -> Iterator[FrameBatch]:
    start = 0
    for frames, height, width in _runs(grid):
        num_patches = height * width
        frames_a_batch = max(1, max_patches // num_patches)
        for first in range(0, frames, frames_a_batch):
            count = min(frames_a_batch, frames - first)
            rows = pixels[start : start + count * num_patches].astype(np.float32, copy=False)
            start += count * num_patches
            yield FrameBatch(rows.reshape(count, num_patches, -1), height, width)


def _runs(grid: IntArray) -> list[tuple[int, int, int]]:
    """Frames of one size that follow each other, items of equal size joined: (frames, height, width)."""
    runs: list[tuple[int, int, int]] = []
    for frames, height, width in grid.tolist():
        if runs and runs[-1][1:] == (height, width):
            frames += runs.pop()[0]
        runs.append((frames, height, width))
    return runs


def _check_pixels(pixels: npt.NDArray[np.float32] | StreamedRows, grid: IntArray, dim: int) -> None:
    got = f"{pixels.dtype}{list(pixels.shape)}"
    if pixels.ndim != 2 or pixels.shape[1] != dim or not np.issubdtype(pixels.dtype, np.floating):
        raise InvalidInput(f"pixel_values: got {got}, expected float32[num_patches, {dim}]")
    rows = int(grid.prod(axis=1).sum())
    if len(pixels) != rows:
        raise InvalidInput(f"pixel_values: got {got}, expected {rows} rows for grid_thw {grid.tolist()}")
