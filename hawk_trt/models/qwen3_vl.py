"""Qwen3-VL, the dense models.

Besides the frames of Qwen2-VL the vision stage takes, for each patch, four places in a learned table of positions and
their weights: the table is resampled to the frame by bilinear interpolation. It also gives DeepStack's features. A
video is told as text: each frame is a picture of its own between vision_start and vision_end, its time before it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.models.config import Section, language_config, text_section, vision_section
from hawk_trt.models.family import ImageSettings, IntArray, TokenRun
from hawk_trt.models.qwen2_vl import Qwen2VL, block_numbers, vision_sizes
from hawk_trt.models.qwen_patches import (
    DEFAULT_FPS,
    MAX_ASPECT_RATIO,
    MIN_FRAMES,
    PLANS_KEPT,
    FrameBatch,
    grown,
    patch_positions,
    shrunk,
)
from hawk_trt.models.vision_config import AnyVision, Qwen3Vision
from hawk_trt.stages import LanguageConfig, StageSpec, TensorSpec, deepstack_embeds_spec


class Qwen3VL(Qwen2VL):
    """The Family of dense Qwen3-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen3_vl"
    max_frame_pixels: ClassVar[int | None] = None
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]] = "video"
    vision: Qwen3Vision

    def __init__(self, vision: Qwen3Vision) -> None:
        super().__init__(vision)

    @classmethod
    def _language_config(cls, config: Mapping[str, Any]) -> LanguageConfig:
        """Queries and keys are normed, mRoPE's axes take turns, DeepStack adds."""
        text = text_section(config)
        rope = Section(text.get("rope_parameters") or text.get("rope_scaling") or {})
        rope.expect("mrope_interleaved", True, True)
        language = language_config(config, qk_norm=True)
        levels = len(block_numbers(vision_section(config), "deepstack_visual_indexes"))
        if levels >= language.num_hidden_layers:
            raise text.wrong("num_hidden_layers", f"more than the {levels} of deepstack_visual_indexes")
        return replace(language, mrope_interleaved=True, deepstack_levels=levels)

    @classmethod
    def _vision_config(cls, config: Mapping[str, Any]) -> AnyVision:
        vision = vision_section(config)
        blocks, places = block_numbers(vision, "deepstack_visual_indexes"), vision.integer("num_position_embeddings")
        if list(blocks) != sorted(set(blocks)):
            raise vision.wrong("deepstack_visual_indexes", "ascending block numbers")
        if math.isqrt(places) ** 2 != places:
            raise vision.wrong("num_position_embeddings", "the square of an integer")
        sizes = vision_sizes(config, vision, "gelu_pytorch_tanh")
        return Qwen3Vision(**sizes, num_position_embeddings=places, deepstack_visual_indexes=blocks)

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph."""
        spec, levels = super().vision_spec(), len(self.vision.deepstack_visual_indexes)
        places = (
            TensorSpec("place_index", "int64", ("num_patches", 4)),
            TensorSpec("place_weight", "float32", ("num_patches", 4)),
        )
        features = deepstack_embeds_spec(levels, self.vision.out_hidden_size)
        return StageSpec((*spec.inputs, *places), (*spec.outputs, *features))

    def _feed(self, batch: FrameBatch) -> dict[str, npt.NDArray[Any]]:
        merge, side = self.vision.spatial_merge_size, math.isqrt(self.vision.num_position_embeddings)
        index, weight = interpolation(batch.height, batch.width, merge, side)
        return super()._feed(batch) | {"place_index": index, "place_weight": weight}

    def frame_size(self, num_frames: int, height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
        """Height and width of the resized frames; the pixel bounds are of all frames together.

        So longer videos get smaller frames.

        Raises:
            InvalidInput: a side more than 200 times the other.
        """
        factor, together = self.vision.token_side, self.vision.temporal_patch_size
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InvalidInput(
                f"video: got frames of {width} x {height} pixels, expected sides of at most 1 to {MAX_ASPECT_RATIO}. "
                "Crop them"
            )
        num_frames = max(num_frames, together)  # a single frame is shown twice
        tall, wide = round(height / factor) * factor, round(width / factor) * factor
        volume = round(num_frames / together) * together * tall * wide
        if volume > settings.max_pixels:
            return shrunk(height, width, factor, math.sqrt(num_frames * height * width / settings.max_pixels))
        if volume < settings.min_pixels:
            return grown(height, width, factor, math.sqrt(settings.min_pixels / (num_frames * height * width)))
        return tall, wide

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a file are taken: from the first to the last, evenly spaced.

        2 a second, or fps; at least 4, where there are so many.
        """
        wanted = int(total / video_fps * (DEFAULT_FPS if fps is None else fps))
        count = min(max(wanted, MIN_FRAMES), max_frames, total)
        numbers: IntArray = np.linspace(0, total - 1, count).round().astype(np.int64)
        return numbers

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """An image's placeholder once for each visual token; of a video each temporal patch's time and tokens.

        The time is the mean of the patch's first and last frame; the last frame is repeated where one is missing. The
        tokens lie between vision_start and vision_end.

        Raises:
            InvalidInput: a video, and the bundle's tokenizer lacks a token that it needs.
        """
        if kind == "image":
            return super().placeholder(kind, grid, times, special)
        start, video, end = special.vision_start, special.video, special.vision_end
        if start is None or video is None or end is None:
            raise InvalidInput(
                "prompt: this bundle's tokenizer lacks <|vision_start|>, <|video_pad|> or <|vision_end|>, which a "
                "video needs. Pass ModelInputs"
            )
        tokens = grid[1] * grid[2] // self.vision.spatial_merge_size**2
        frame = (TokenRun(start), TokenRun(video, tokens), TokenRun(end))
        together = -(-len(times) // grid[0])
        parts: list[str | TokenRun] = []
        for first in range(0, len(times), together):
            last = min(first + together, len(times)) - 1
            parts += [f"<{(times[first] + times[last]) / 2:.1f} seconds>", *frame]
        return tuple(parts)

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


@lru_cache(maxsize=PLANS_KEPT)
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
    positions = patch_positions(height, width, merge)
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
