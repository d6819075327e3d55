"""Qwen2.5-VL: most blocks of its vision tower attend in windows, and mRoPE's time axis counts seconds.

Every frame of a size shares its host plan: window order, rotary positions and window masks. Full-attention layers then
need no gather and no mask, and there never is an N x N mask.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hawk_trt.models import qwen_config, qwen_positions, qwen_windows
from hawk_trt.models.family import IntArray, ModelConfig, Patches
from hawk_trt.models.qwen2_vl import Qwen2VL
from hawk_trt.models.vision_config import Qwen25Vision
from hawk_trt.stages import StageSpec


class Qwen25VL(Qwen2VL):
    """The Family of Qwen2.5-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen2_5_vl"
    vision: Qwen25Vision

    def __init__(self, vision: Qwen25Vision) -> None:
        super().__init__(vision)

    @staticmethod
    def read_config(
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json; see qwen_config."""
        language, vision = qwen_config.language_config(config), qwen_config.windowed_vision_config(config)
        tokens = qwen_config.special_tokens(config, generation or {}, added_tokens or {})
        return ModelConfig(language, vision, tokens)

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph; see qwen_windows.vision_spec."""
        return qwen_windows.vision_spec(self.vision)

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; see qwen_windows.vision_feeds."""
        return qwen_windows.vision_feeds(patches, self.vision, max_patches)

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [3, seq_len]; see qwen_positions.position_ids."""
        merge, rate = self.vision.spatial_merge_size, self.vision.tokens_per_second
        return qwen_positions.position_ids(visual_kind, image_grid_thw, video_grid_thw, second_per_grid_ts, merge, rate)
