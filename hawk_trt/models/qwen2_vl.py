"""Runtime facts of Qwen2-VL: as Qwen2.5-VL's, but without windows, and a frame is one step of the time axis."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.models import qwen_config, qwen_frames, qwen_positions
from hawk_trt.models.family import Patches
from hawk_trt.models.qwen2_5_vl import Qwen25VL
from hawk_trt.models.settings import integer, number
from hawk_trt.stages import StageSpec, TensorSpec

# The released config.json files leave out most of these: transformers' own defaults then hold.
_VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


class Qwen2VL(Qwen25VL):
    """The Family of Qwen2-VL checkpoints of any size."""

    name = "qwen2_vl"
    architectures: tuple[str, ...] = ("Qwen2VLForConditionalGeneration",)

    def vision_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes of the vision tower, as qwen_config.vision_sizes names them.

        config.json calls the tower's width embed_dim and the language model's hidden_size.
        """
        vision = _VISION_DEFAULTS | dict(qwen_config.vision_section(config))
        width = integer(vision, "embed_dim", "vision_config.")
        named = {
            "hidden_size": width,
            "out_hidden_size": vision["hidden_size"],
            "intermediate_size": int(width * number(vision, "mlp_ratio", "vision_config.")),
        }
        return qwen_config.vision_sizes(config, {**vision, **named}, "quick_gelu")

    def vision_spec(self, vision: Mapping[str, Any], hidden_size: int) -> StageSpec:
        """Inputs and outputs of the vision graph."""
        embeds = TensorSpec("visual_embeds", "model", ("num_visual", hidden_size))
        return StageSpec(qwen_frames.frame_inputs(vision), (embeds,))

    def vision_feeds(
        self, patches: Patches, vision: Mapping[str, Any], max_patches: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; see qwen_frames."""
        batches = qwen_frames.frame_batches(patches, vision, max_patches)
        return (qwen_frames.frame_feeds(batch, vision) for batch in batches)

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: npt.NDArray[np.int64],
        video_grid_thw: npt.NDArray[np.int64],
        second_per_grid_ts: npt.NDArray[np.float32],
        vision: Mapping[str, Any],
    ) -> npt.NDArray[np.int64]:
        """Positions of a prompt without padding: int64 [3, seq_len]; how long a frame is makes no difference."""
        steps = np.ones(len(video_grid_thw), np.float32)
        timed = {**vision, "tokens_per_second": 1.0}
        return qwen_positions.position_ids(visual_kind, image_grid_thw, video_grid_thw, steps, timed)
