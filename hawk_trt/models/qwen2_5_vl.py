"""Qwen2.5-VL: most blocks of its vision tower attend in windows, and mRoPE's time axis counts seconds.

Window attention wants the merge blocks of a window together, so the rows of pixel_values are put in window order here,
where it costs one copy; window_index then batches the windows. Every frame of a size shares its plan. Blocks that
attend over whole frames need no gather and no mask, and there never is an N x N mask.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hawk_trt.models.config import vision_section
from hawk_trt.models.family import IntArray
from hawk_trt.models.qwen2_vl import Qwen2VL, block_numbers, vision_sizes
from hawk_trt.models.qwen_patches import PLANS_KEPT, FrameBatch
from hawk_trt.models.qwen_positions import position_ids
from hawk_trt.models.vision_config import AnyVision, Qwen25Vision
from hawk_trt.stages import StageSpec, TensorSpec

# transformers 4.49 leaves out of a config.json that it saves what equals its own defaults.
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


class Qwen25VL(Qwen2VL):
    """The Family of Qwen2.5-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen2_5_vl"
    vision: Qwen25Vision

    def __init__(self, vision: Qwen25Vision) -> None:
        super().__init__(vision)

    @classmethod
    def _vision_config(cls, config: Mapping[str, Any]) -> AnyVision:
        vision = vision_section(config, _VISION_DEFAULTS)
        sizes = Qwen25Vision(
            **vision_sizes(config, vision, "silu"),
            tokens_per_second=vision.number("tokens_per_second"),
            window_size=vision.integer("window_size"),
            fullatt_block_indexes=block_numbers(vision, "fullatt_block_indexes"),
        )
        if not sizes.window_side:
            raise vision.wrong("window_size", "at least patch_size * spatial_merge_size")
        return sizes

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph."""
        spec = super().vision_spec()
        windows = (
            TensorSpec("window_index", "int64", ("num_windows", "window_len")),
            TensorSpec("window_mask", "bool", ("num_windows", "window_len")),
            TensorSpec("window_slot", "int64", ("num_patches",)),
            TensorSpec("merge_order", "int64", ("num_merged",)),
        )
        return replace(spec, inputs=(*spec.inputs, *windows))

    def _feed(self, batch: FrameBatch) -> dict[str, npt.NDArray[Any]]:
        order, plan = window_plan(batch.height, batch.width, self.vision.spatial_merge_size, self.vision.window_side)
        by_block = batch.pixel_values.reshape(len(batch.pixel_values), len(order), -1)[:, order]
        return {"pixel_values": by_block.reshape(batch.pixel_values.shape), **plan}

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [3, seq_len]; see qwen_positions.py."""
        merge, rate = self.vision.spatial_merge_size, self.vision.tokens_per_second
        return position_ids(visual_kind, image_grid_thw, video_grid_thw, second_per_grid_ts, merge, rate)


@lru_cache(maxsize=PLANS_KEPT)
def window_plan(height: int, width: int, merge: int, window: int) -> tuple[IntArray, dict[str, npt.NDArray[Any]]]:
    """Lay out one frame in windows.

    Args:
        height: of the frame, in patches; a multiple of merge.
        width: of the frame, in patches; a multiple of merge.
        merge: patches on a side of a merge block.
        window: merge blocks on a side of a window; windows at the right and lower edge may be smaller.

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
