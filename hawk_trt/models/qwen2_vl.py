"""Qwen2-VL, and what Qwen2.5-VL and Qwen3-VL share with it.

The vision stage sees frames of one size at a time, as [num_frames, num_patches, patch_dim]; each attends to itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.models import qwen_config, qwen_frames, qwen_patches, qwen_positions, qwen_video
from hawk_trt.models.family import ImageSettings, IntArray, ModelConfig, Patches, TokenRun
from hawk_trt.models.qwen_video import sample_indices
from hawk_trt.models.settings import integer, number
from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.request import ModelInputs
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


class Qwen2VL:
    """The Family of Qwen2-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen2_vl"
    max_frame_pixels: ClassVar[int | None] = qwen_video.MAX_FRAME_PIXELS
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]] = "frame"
    vision: Qwen2Vision

    def __init__(self, vision: Qwen2Vision) -> None:
        self.vision = vision

    @staticmethod
    def read_config(
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json, which calls the tower's width embed_dim and the language model's hidden_size."""
        language = qwen_config.language_config(config)
        vision = _VISION_DEFAULTS | dict(qwen_config.vision_section(config))
        width = integer(vision, "embed_dim", "vision_config.")
        named = {
            "hidden_size": width,
            "out_hidden_size": vision["hidden_size"],
            "intermediate_size": int(width * number(vision, "mlp_ratio", "vision_config.")),
        }
        sizes = qwen_config.vision_sizes(config, {**vision, **named}, "quick_gelu")
        tokens = qwen_config.special_tokens(config, generation or {}, added_tokens or {})
        return ModelConfig(language, Qwen2Vision(**sizes), tokens)

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph."""
        embeds = TensorSpec("visual_embeds", "model", ("num_visual", self.vision.out_hidden_size))
        return StageSpec(qwen_frames.frame_inputs(self.vision), (embeds,))

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; see qwen_frames."""
        batches = qwen_frames.frame_batches(patches, self.vision, max_patches)
        return (qwen_frames.frame_feeds(batch, self.vision) for batch in batches)

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json or video_preprocessor_config.json; see qwen_patches."""
        return qwen_patches.image_settings(preprocessor)

    def images_to_patches(self, images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3]; see qwen_patches.images_to_patches."""
        return qwen_patches.images_to_patches(images, settings, self.vision)

    def video_to_patches(self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the frames of one video; see qwen_video.video_to_patches."""
        return qwen_video.video_to_patches(frames, settings, self.vision)

    def image_parts(self, image: npt.NDArray[np.uint8], count: int) -> Sequence[npt.NDArray[np.uint8]]:
        """The image itself."""
        return [image]

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken; see video.sample_indices."""
        return sample_indices(total, video_fps, fps, max_frames)

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """The placeholder once for each visual token."""
        token_id = special.image if kind == "image" else special.video
        assert token_id is not None  # the template has made one of it
        return (TokenRun(token_id, int(np.prod(grid)) // self.vision.spatial_merge_size**2),)

    def model_inputs(
        self,
        input_ids: IntArray,
        kinds: Sequence[str],
        images: Patches | None,
        videos: Patches | None,
        second_per_grid_ts: npt.NDArray[np.float32] | None,
    ) -> ModelInputs:
        """Images and videos apart, each with its grids."""
        return ModelInputs(
            input_ids=input_ids,
            pixel_values=None if images is None else np.asarray(images.pixel_values),
            image_grid_thw=None if images is None else images.grid_thw,
            pixel_values_videos=None if videos is None else videos.pixel_values,
            video_grid_thw=None if videos is None else videos.grid_thw,
            second_per_grid_ts=second_per_grid_ts,
        )

    def item_grids(self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8]) -> tuple[IntArray, IntArray]:
        """The grid_thw that the inputs hold: int64 [items, 3] each.

        Raises:
            InvalidInput: not of that shape, a size below 1, or no multiple of the merge size.
        """
        images, videos = inputs.image_grid_thw, inputs.video_grid_thw
        merge = self.vision.spatial_merge_size
        return (
            qwen_positions.item_grid("image_grid_thw", images, merge),
            qwen_positions.item_grid("video_grid_thw", videos, merge),
        )

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [3, seq_len]; how long a frame is makes no difference."""
        steps = np.ones(len(video_grid_thw), np.float32)
        merge = self.vision.spatial_merge_size
        return qwen_positions.position_ids(visual_kind, image_grid_thw, video_grid_thw, steps, merge, 1.0)
