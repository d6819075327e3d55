"""Runtime facts of Qwen2.5-VL: sizes, patches, the vision host plan and mRoPE positions.

The vision stage sees frames of one size at a time, as [num_frames, num_patches, patch_dim]. Every frame of
a size shares its host plan: window order, rotary positions and window masks. Full-attention layers then
need no gather and no mask, and there never is an N x N mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.inputs.video import sample_indices
from hawk_trt.models import qwen_config, qwen_patches, qwen_positions, qwen_video, qwen_windows
from hawk_trt.models.family import ImageSettings, IntArray, Patches, TokenRun
from hawk_trt.request import ModelInputs
from hawk_trt.stages import LanguageConfig, StageSpec


class Qwen25VL:
    """The Family of Qwen2.5-VL checkpoints of any size."""

    name = "qwen2_5_vl"
    architectures: tuple[str, ...] = ("Qwen2_5_VLForConditionalGeneration",)
    max_frame_pixels: int | None = qwen_video.MAX_FRAME_PIXELS

    def language_config(self, config: Mapping[str, Any]) -> LanguageConfig:
        """Sizes of the language model; see qwen_config.language_config."""
        return qwen_config.language_config(config)

    def vision_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes of the vision tower; see qwen_config.windowed_vision_config."""
        return qwen_config.windowed_vision_config(config)

    def special_tokens(
        self, config: Mapping[str, Any], generation: Mapping[str, Any], added_tokens: Mapping[str, int]
    ) -> SpecialTokens:
        """Ids of the special tokens; see qwen_config.special_tokens."""
        return qwen_config.special_tokens(config, generation, added_tokens)

    def chat_template(self, config: Mapping[str, Any]) -> str | None:
        """None: the checkpoints hold it."""
        return None

    def vision_spec(self, vision: Mapping[str, Any], hidden_size: int) -> StageSpec:
        """Inputs and outputs of the vision graph; see qwen_windows.vision_spec."""
        return qwen_windows.vision_spec(vision, hidden_size)

    def item_grids(
        self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8], vision: Mapping[str, Any]
    ) -> tuple[IntArray, IntArray]:
        """The grid_thw that the inputs hold; see qwen_positions.item_grids."""
        return qwen_positions.item_grids(inputs)

    def tokens_per_item(self, grid_thw: npt.NDArray[np.int64], vision: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        """Visual tokens of each image or video: int64 [items]."""
        return qwen_positions.tokens_per_item(grid_thw, vision)

    def vision_feeds(
        self, patches: Patches, vision: Mapping[str, Any], max_patches: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; see qwen_windows.vision_feeds."""
        return qwen_windows.vision_feeds(patches, vision, max_patches)

    def image_settings(self, preprocessor: Mapping[str, Any], vision: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json or video_preprocessor_config.json; see qwen_patches."""
        return qwen_patches.image_settings(preprocessor)

    def images_to_patches(
        self, images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings, vision: Mapping[str, Any]
    ) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3]; see qwen_patches.images_to_patches."""
        return qwen_patches.images_to_patches(images, settings, vision)

    def video_to_patches(
        self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings, vision: Mapping[str, Any]
    ) -> Patches:
        """Resize, normalise and cut the frames of one video; see qwen_video.video_to_patches."""
        return qwen_video.video_to_patches(frames, settings, vision)

    def image_parts(
        self, image: npt.NDArray[np.uint8], count: int, vision: Mapping[str, Any]
    ) -> Sequence[npt.NDArray[np.uint8]]:
        """The image itself."""
        return [image]

    def frame_numbers(self, total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken; see video.sample_indices."""
        return sample_indices(total, video_fps, fps, max_frames)

    def placeholder(
        self,
        kind: str,
        grid: Sequence[int],
        times: Sequence[float],
        vision: Mapping[str, Any],
        special: SpecialTokens,
    ) -> tuple[str | TokenRun, ...]:
        """The placeholder once for each visual token."""
        return qwen_positions.placeholder(kind, grid, vision, special)

    def model_inputs(
        self,
        input_ids: IntArray,
        kinds: Sequence[str],
        images: Patches | None,
        videos: Patches | None,
        second_per_grid_ts: npt.NDArray[np.float32] | None,
    ) -> ModelInputs:
        """Images and videos apart, each with its grids; see qwen_patches.model_inputs."""
        return qwen_patches.model_inputs(input_ids, images, videos, second_per_grid_ts)

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: npt.NDArray[np.int64],
        video_grid_thw: npt.NDArray[np.int64],
        second_per_grid_ts: npt.NDArray[np.float32],
        vision: Mapping[str, Any],
    ) -> npt.NDArray[np.int64]:
        """Positions of a prompt without padding: int64 [3, seq_len]; see qwen_positions.position_ids."""
        return qwen_positions.position_ids(visual_kind, image_grid_thw, video_grid_thw, second_per_grid_ts, vision)
