"""Qwen2.5-VL: most blocks of its vision tower attend in windows, and mRoPE's time axis counts seconds.

Window attention wants the merge blocks of a window together, so the rows of pixel_values are put in window order here,
where it costs one copy; window_index then batches the windows. Every frame of a size shares its plan. Blocks that
attend over whole frames need no gather and no mask, and there never is an N x N mask.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.models.family import Floats, IntArray, Kinds
from hawk_trt.models.qwen2_vl import Qwen2VL
from hawk_trt.models.qwen_patches import PLANS_KEPT, position_ids
from hawk_trt.models.vision_config import Qwen25Vision


class Qwen25VL(Qwen2VL):
    """The Family of Qwen2.5-VL checkpoints of any size."""

    vision: Qwen25Vision

    def _feed(self, pixels: Floats, height: int, width: int) -> dict[str, npt.NDArray[Any]]:
        order, plan = window_plan(height, width, self.vision.spatial_merge_size, self.vision.window_side)
        by_block = pixels.reshape(len(pixels), len(order), -1)[:, order]
        return {"pixel_values": by_block.reshape(pixels.shape), **plan}

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """Positions whose time axis counts seconds."""
        vision = self.vision
        return position_ids(visual_kind, images, videos, seconds, vision.spatial_merge_size, vision.tokens_per_second)


@lru_cache(maxsize=PLANS_KEPT)
def window_plan(height: int, width: int, merge: int, window: int) -> tuple[IntArray, dict[str, npt.NDArray[Any]]]:
    """Lay out one frame of height x width patches in windows.

    merge: patches on a side of a merge block.  window: merge blocks on a side of a window; windows at the right and
    lower edge may be smaller.

    Returns:
        The raster number of each merge block, in window order: int64 [num_merged]; and feeds of the vision stage, all
        read-only:
        patch_positions: int64 [num_patches, 2], row and column of each patch, in window order.
        window_index: int64 [num_windows, window_len], the patches of each window; 0 in unused slots.
        window_mask: bool [num_windows, window_len], True in used slots.
        window_slot: int64 [num_patches], the place of each patch in the flattened window_index.
        merge_order: int64 [num_merged], the row in window order of each merge block, in raster order.
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
    plan = {
        "patch_positions": positions,
        "window_index": np.where(mask, starts[:, None] + slots, 0),
        "window_mask": mask,
        "window_slot": np.flatnonzero(mask),
        "merge_order": np.argsort(block_order),
    }
    for array in (block_order, *plan.values()):
        array.flags.writeable = False  # shared by every call with this size
    return block_order, plan
