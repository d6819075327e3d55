"""Runtime facts of dense Qwen3-VL models.

Besides the frames of Qwen2-VL the vision stage takes, for each patch, four places in a learned table of positions and
their weights: the table is resampled to the frame by bilinear interpolation. It also gives DeepStack's features. A
video is told as text: each frame is a picture of its own between vision_start and vision_end, its time before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.models import qwen3_video, qwen_config, qwen_frames, qwen_video
from hawk_trt.models.family import ImageSettings, IntArray, ModelConfig, Patches, TokenRun
from hawk_trt.models.qwen2_vl import Qwen2VL
from hawk_trt.models.settings import expect, integer, wrong
from hawk_trt.models.vision_config import Qwen3Vision
from hawk_trt.stages import LanguageConfig, StageSpec, TensorSpec, deepstack_embeds_spec

_PLANS_KEPT = 16


class Qwen3VL(Qwen2VL):
    """The Family of dense Qwen3-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen3_vl"
    max_frame_pixels: ClassVar[int | None] = None
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]] = "video"
    vision: Qwen3Vision

    def __init__(self, vision: Qwen3Vision) -> None:
        super().__init__(vision)

    @staticmethod
    def read_config(
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json: queries and keys are normed, mRoPE's axes take turns, DeepStack adds."""
        blocks = _deepstack_blocks(config)
        tokens = qwen_config.special_tokens(config, generation or {}, added_tokens or {})
        return ModelConfig(_language_config(config, len(blocks)), _vision_config(config, blocks), tokens)

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph."""
        spec, levels = super().vision_spec(), len(self.vision.deepstack_visual_indexes)
        places = (
            TensorSpec("place_index", "int64", ("num_patches", 4)),
            TensorSpec("place_weight", "float32", ("num_patches", 4)),
        )
        features = deepstack_embeds_spec(levels, self.vision.out_hidden_size)
        return StageSpec((*spec.inputs, *places), (*spec.outputs, *features))

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; see qwen_frames and interpolation."""
        batches = qwen_frames.frame_batches(patches, self.vision, max_patches)
        return (self._feeds(batch) for batch in batches)

    def video_to_patches(self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the frames of one video; the pixel bounds are of all frames together."""
        factor, together = self.vision.token_side, self.vision.temporal_patch_size

        def frame_size(height: int, width: int) -> tuple[int, int]:
            bounds = (settings.min_pixels, settings.max_pixels)
            return qwen3_video.frame_size(len(frames), height, width, factor, together, *bounds)

        return qwen_video.video_to_patches(frames, settings, self.vision, frame_size)

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken; see qwen3_video.frame_numbers."""
        return qwen3_video.frame_numbers(total, video_fps, fps, max_frames)

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """An image's placeholder once for each visual token; a video as qwen3_video.video_text tells it."""
        if kind == "image":
            return super().placeholder(kind, grid, times, special)
        tokens_a_frame = grid[1] * grid[2] // self.vision.spatial_merge_size**2
        return qwen3_video.video_text(grid, tokens_a_frame, times, special)

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [3, seq_len]; each frame of a video counts as an image."""
        frames = np.repeat(video_grid_thw, video_grid_thw[:, 0], axis=0)
        frames[:, 0] = 1
        return super().position_ids(visual_kind, image_grid_thw, frames, second_per_grid_ts)

    def _feeds(self, batch: qwen_frames.FrameBatch) -> dict[str, npt.NDArray[Any]]:
        merge, side = self.vision.spatial_merge_size, isqrt(self.vision.num_position_embeddings)
        index, weight = interpolation(batch.height, batch.width, merge, side)
        return qwen_frames.frame_feeds(batch, self.vision) | {"place_index": index, "place_weight": weight}


def _language_config(config: Mapping[str, Any], levels: int) -> LanguageConfig:
    text = qwen_config.text_settings(config)
    expect("attention_bias", text.get("attention_bias", False), False)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    expect("mrope_interleaved", rope.get("mrope_interleaved", True), True)
    language = qwen_config.language_config(config, own_head_dim=True)
    if levels >= language.num_hidden_layers:
        layers = language.num_hidden_layers
        raise wrong("num_hidden_layers", layers, f"more than the {levels} of deepstack_visual_indexes")
    return replace(language, qk_norm=True, mrope_interleaved=True, deepstack_levels=levels)


def _vision_config(config: Mapping[str, Any], blocks: tuple[int, ...]) -> Qwen3Vision:
    vision = qwen_config.vision_section(config)
    sizes = qwen_config.vision_sizes(config, vision, "gelu_pytorch_tanh")
    places = integer(vision, "num_position_embeddings", "vision_config.")
    if isqrt(places) ** 2 != places:
        raise wrong("vision_config.num_position_embeddings", places, "the square of an integer")
    return Qwen3Vision(**sizes, num_position_embeddings=places, deepstack_visual_indexes=blocks)


def _deepstack_blocks(config: Mapping[str, Any]) -> tuple[int, ...]:
    blocks = qwen_config.block_numbers(qwen_config.vision_section(config), "deepstack_visual_indexes")
    if list(blocks) != sorted(set(blocks)):
        raise wrong("vision_config.deepstack_visual_indexes", list(blocks), "ascending block numbers")
    return blocks


@lru_cache(maxsize=_PLANS_KEPT)
def interpolation(height: int, width: int, merge: int, side: int) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """How the table of positions is resampled to a frame, corner on corner, bilinearly.

    Args:
        height: of the frame, in patches.
        width: of the frame, in patches.
        merge: patches on a side of a merge block.
        side: of the square table.

    Returns:
        Four places in the flattened table and their weights for each patch, in the processor's order:
        int64 and float32 [num_patches, 4], read-only.
    """
    positions = qwen_frames.patch_positions(height, width, merge)
    (low_row, high_row), row_weights = _taps(positions[:, 0], height, side)
    (low_column, high_column), column_weights = _taps(positions[:, 1], width, side)
    index = np.stack(
        [row * side + column for row in (low_row, high_row) for column in (low_column, high_column)], axis=1
    )
    weight = (row_weights[:, :, None] * column_weights[:, None]).reshape(-1, 4)
    index.flags.writeable = weight.flags.writeable = False  # shared by every call with this size
    return index, weight


def _taps(places: IntArray, size: int, side: int) -> tuple[tuple[IntArray, IntArray], npt.NDArray[np.float32]]:
    """The two neighbours in the table of each place on an axis of a size, and their weights [places, 2].

    float32 as in the checkpoint's own code, so that the weights are the same to the bit.
    """
    source = places.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    share = source - low
    index = low.astype(np.int64)
    weights = np.stack([np.float32(1) - share, np.float32(1) - np.abs(share - np.float32(1))], axis=1)
    return (index, np.minimum(index + 1, side - 1)), weights
