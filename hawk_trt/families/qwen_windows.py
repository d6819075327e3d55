"""The vision host plan of Qwen2.5-VL: which patch lies where, so that the graph itself computes nothing about sizes.

Enters: patches and the grid (time, height, width) of each image or video. Leaves: feeds of the vision stage,
each for frames of one size. The processor orders the patches of a frame by merge block (m x m patches become
one token), blocks in raster order. Window attention wants the blocks of a window together, so the rows of
pixel_values are put in window order here, where it costs one copy; window_index then batches the windows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.families import Patches
from hawk_trt.families.qwen_patches import patch_dim
from hawk_trt.families.qwen_positions import check_grid
from hawk_trt.stages import StageSpec, TensorSpec

_PLANS_KEPT = 16


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Where the patches of a frame of height x width patches lie. All arrays are read-only.

    Attributes:
        block_order: int64 [num_merged], the raster number of each merge block, in window order.
        patch_positions: int64 [num_patches, 2], row and column of each patch, in window order.
        window_index: int64 [num_windows, window_len], the patches of each window; 0 in unused slots.
        window_mask: bool [num_windows, window_len], True in used slots.
        window_slot: int64 [num_patches], the place of each patch in the flattened window_index.
        merge_order: int64 [num_merged], the row in window order of each merge block, in raster order.
    """

    block_order: npt.NDArray[np.int64]
    patch_positions: npt.NDArray[np.int64]
    window_index: npt.NDArray[np.int64]
    window_mask: npt.NDArray[np.bool_]
    window_slot: npt.NDArray[np.int64]
    merge_order: npt.NDArray[np.int64]


@lru_cache(maxsize=_PLANS_KEPT)
def window_plan(height: int, width: int, merge: int, window: int) -> WindowPlan:
    """Lay out one frame.

    Args:
        height: of the frame, in patches; a multiple of merge.
        width: of the frame, in patches; a multiple of merge.
        merge: patches on a side of a merge block.
        window: merge blocks on a side of a window; windows at the right and lower edge may be smaller.
    """
    blocks_high, blocks_wide = height // merge, width // merge
    rows, columns = np.divmod(np.arange(blocks_high * blocks_wide), blocks_wide)
    window_of_block = rows // window * -(-blocks_wide // window) + columns // window
    block_order = np.argsort(window_of_block, kind="stable")  # raster order within each window

    within_rows, within_columns = np.divmod(np.arange(merge * merge), merge)
    positions = np.stack(
        (
            rows[block_order, None] * merge + within_rows,
            columns[block_order, None] * merge + within_columns,
        ),
        axis=-1,
    ).reshape(-1, 2)

    lengths = np.bincount(window_of_block) * merge * merge
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(lengths.max())
    mask = slots < lengths[:, None]
    plan = WindowPlan(
        block_order=block_order,
        patch_positions=positions,
        window_index=np.where(mask, starts[:, None] + slots, 0),
        window_mask=mask,
        window_slot=np.flatnonzero(mask),
        merge_order=np.argsort(block_order),
    )
    for array in (plan.block_order, positions, plan.window_index, mask, plan.window_slot, plan.merge_order):
        array.flags.writeable = False  # shared by every call with this size
    return plan


def vision_spec(vision: Mapping[str, Any], hidden_size: int) -> StageSpec:
    """Inputs and outputs of the vision graph.

    num_visual = num_frames * num_merged, frames in order, merge blocks of a frame in raster order.
    """
    return StageSpec(
        inputs=(
            TensorSpec("pixel_values", "float32", ("num_frames", "num_patches", patch_dim(vision))),
            TensorSpec("patch_positions", "int64", ("num_patches", 2)),
            TensorSpec("window_index", "int64", ("num_windows", "window_len")),
            TensorSpec("window_mask", "bool", ("num_windows", "window_len")),
            TensorSpec("window_slot", "int64", ("num_patches",)),
            TensorSpec("merge_order", "int64", ("num_merged",)),
        ),
        outputs=(TensorSpec("visual_embeds", "model", ("num_visual", hidden_size)),),
    )


def vision_feeds(
    patches: Patches, vision: Mapping[str, Any], max_patches: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Feeds of the vision stage, one call after another; their results, concatenated, are in prompt order.

    Args:
        patches: rows in the processor's order, and the grid of each image or video.
        vision: sizes of the vision tower.
        max_patches: of one call; consecutive frames of one size share a call up to it. A single frame may
            exceed it.

    Raises:
        InvalidInput: pixel_values and grid_thw do not fit each other, or not the model.
    """
    merge = vision["spatial_merge_size"]
    window = vision["window_size"] // (merge * vision["patch_size"])
    grid = check_grid("grid_thw", patches.grid_thw, merge)
    pixels = _check_pixels(patches.pixel_values, grid, patch_dim(vision))
    return _feeds(pixels, grid, merge, window, max_patches)  # a generator of its own: errors come at the call


def _feeds(
    pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64], merge: int, window: int, max_patches: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    start = 0
    for frames, height, width in _runs(grid):
        plan = window_plan(height, width, merge, window)
        num_patches = height * width
        frames_a_call = max(1, max_patches // num_patches)
        for first in range(0, frames, frames_a_call):
            count = min(frames_a_call, frames - first)
            rows = pixels[start : start + count * num_patches]
            start += count * num_patches
            blocks = rows.reshape(count, len(plan.block_order), -1)[:, plan.block_order]
            yield {
                "pixel_values": blocks.astype(np.float32, copy=False).reshape(count, num_patches, -1),
                "patch_positions": plan.patch_positions,
                "window_index": plan.window_index,
                "window_mask": plan.window_mask,
                "window_slot": plan.window_slot,
                "merge_order": plan.merge_order,
            }


def _runs(grid: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Frames of one size that follow each other, items of equal size joined: (frames, height, width)."""
    runs: list[tuple[int, int, int]] = []
    for frames, height, width in grid.tolist():
        if runs and runs[-1][1:] == (height, width):
            frames += runs.pop()[0]
        runs.append((frames, height, width))
    return runs


def _check_pixels(pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64], dim: int) -> npt.NDArray[np.float32]:
    got = f"{pixels.dtype}{list(pixels.shape)}"
    if pixels.ndim != 2 or pixels.shape[1] != dim or not np.issubdtype(pixels.dtype, np.floating):
        raise InvalidInput(f"pixel_values: got {got}, expected float32[num_patches, {dim}]")
    rows = int(grid.prod(axis=1).sum())
    if len(pixels) != rows:
        raise InvalidInput(f"pixel_values: got {got}, expected {rows} rows for grid_thw {grid.tolist()}")
    return pixels
