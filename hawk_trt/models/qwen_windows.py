"""The vision host plan of Qwen2.5-VL: which patch lies where, so that the graph itself computes nothing about sizes.

Enters: patches and the grid (time, height, width) of each image or video. Leaves: feeds of the vision stage,
each for frames of one size. The processor orders the patches of a frame by merge block (m x m patches become
one token), blocks in raster order. Window attention wants the blocks of a window together, so the rows of
pixel_values are put in window order here, where it costs one copy; window_index then batches the windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.models.family import Patches
from hawk_trt.models.qwen_frames import FrameBatch, frame_batches
from hawk_trt.models.vision_config import Qwen25Vision
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


def vision_spec(vision: Qwen25Vision) -> StageSpec:
    """Inputs and outputs of the vision graph.

    num_visual = num_frames * num_merged, frames in order, merge blocks of a frame in raster order.
    """
    return StageSpec(
        inputs=(
            TensorSpec("pixel_values", "float32", ("num_frames", "num_patches", vision.patch_dim)),
            TensorSpec("patch_positions", "int64", ("num_patches", 2)),
            TensorSpec("window_index", "int64", ("num_windows", "window_len")),
            TensorSpec("window_mask", "bool", ("num_windows", "window_len")),
            TensorSpec("window_slot", "int64", ("num_patches",)),
            TensorSpec("merge_order", "int64", ("num_merged",)),
        ),
        outputs=(TensorSpec("visual_embeds", "model", ("num_visual", vision.out_hidden_size)),),
    )


def vision_feeds(patches: Patches, vision: Qwen25Vision, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Feeds of the vision stage, one call after another; their results, concatenated, are in prompt order.

    Args:
        patches: rows in the processor's order, and the grid of each image or video.
        vision: sizes of the vision tower.
        max_patches: of one call; consecutive frames of one size share a call up to it. A single frame may
            exceed it.

    Raises:
        InvalidInput: pixel_values and grid_thw do not fit each other, or not the model.
    """
    return _feeds(frame_batches(patches, vision, max_patches), vision)  # errors come at the call, not at the first feed


def _feeds(batches: Iterator[FrameBatch], vision: Qwen25Vision) -> Iterator[dict[str, npt.NDArray[Any]]]:
    for batch in batches:
        plan = window_plan(batch.height, batch.width, vision.spatial_merge_size, vision.window_side)
        count, num_patches, _ = batch.pixel_values.shape
        blocks = batch.pixel_values.reshape(count, len(plan.block_order), -1)[:, plan.block_order]
        yield {
            "pixel_values": blocks.reshape(count, num_patches, -1),
            "patch_positions": plan.patch_positions,
            "window_index": plan.window_index,
            "window_mask": plan.window_mask,
            "window_slot": plan.window_slot,
            "merge_order": plan.merge_order,
        }
