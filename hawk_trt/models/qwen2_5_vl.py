"""Qwen2.5-VL: most blocks of its vision tower attend in windows, and mRoPE's time axis counts seconds.

window_index batches the patches of each window, and window_slot finds each patch again, so patches stay in the order of
the processor. Every frame of a size shares its plan. Blocks that attend over whole frames need no gather and no mask,
and there never is an N x N mask.
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
        merge, side = self.vision.spatial_merge_size, self.vision.window_side
        return super()._feed(pixels, height, width) | window_plan(height, width, merge, side)

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """Positions whose time axis counts seconds."""
        vision = self.vision
        return position_ids(visual_kind, images, videos, seconds, vision.spatial_merge_size, vision.tokens_per_second)


@lru_cache(maxsize=PLANS_KEPT)
def window_plan(height: int, width: int, merge: int, window: int) -> dict[str, npt.NDArray[Any]]:
    """Lay out one frame of height x width patches in windows.

    merge: patches on a side of a merge block.  window: merge blocks on a side of a window; windows at the right and
    lower edge may be smaller.

    Returns feeds of the vision stage, all read-only:
        window_index: int64 [num_windows, window_len], the patches of each window; 0 in unused slots.
        window_mask: bool [num_windows, window_len], True in used slots.
        window_slot: int64 [num_patches], the place of each patch in the flattened window_index.
    """
    blocks_high, blocks_wide = height // merge, width // merge
    rows, columns = np.divmod(np.arange(blocks_high * blocks_wide), blocks_wide)
    window_of_block = rows // window * -(-blocks_wide // window) + columns // window
    block_order = np.argsort(window_of_block, kind="stable")  # raster order within each window
    patches = (block_order[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)

    lengths = np.bincount(window_of_block) * merge**2
    mask = np.arange(lengths.max()) < lengths[:, None]
    index, slot = np.zeros(mask.shape, np.int64), np.empty(len(patches), np.int64)
    index[mask] = patches
    slot[patches] = np.flatnonzero(mask)
    plan = {"window_index": index, "window_mask": mask, "window_slot": slot}
    for array in plan.values():
        array.flags.writeable = False  # shared by every call with this size
    return plan
