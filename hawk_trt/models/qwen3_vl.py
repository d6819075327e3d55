"""Qwen3-VL, the dense models.

Besides the frames of Qwen2-VL the vision stage takes, for each patch, four places in a learned table of positions and
their weights: the table is resampled to the frame by bilinear interpolation. It also gives DeepStack's features. A
video is told as text: each frame is a picture of its own between vision_start and vision_end, its time before it.
"""

import math
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.models import qwen_patches
from hawk_trt.models.family import Floats, ImageSettings, IntArray, Kinds, Patches, PixelBounds, TokenRun
from hawk_trt.models.qwen2_vl import Qwen2VL
from hawk_trt.models.vision_config import Qwen3Vision


class Qwen3VL(Qwen2VL):
    """The Family of dense Qwen3-VL checkpoints of any size."""

    max_frame_pixels: ClassVar[int | None] = None
    pixel_bounds: ClassVar[PixelBounds] = "video"
    vision: Qwen3Vision

    def _feed(self, pixels: Floats, height: int, width: int) -> dict[str, npt.NDArray[Any]]:
        merge, side = self.vision.spatial_merge_size, math.isqrt(self.vision.num_position_embeddings)
        index, weight = interpolation(height, width, merge, side)
        return super()._feed(pixels, height, width) | {"place_index": index, "place_weight": weight}

    def frame_size(self, num_frames: int, height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
        """The pixel bounds are of all frames together, so longer videos get smaller frames."""
        factor, together = self.vision.token_side, self.vision.temporal_patch_size
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        num_frames = max(num_frames, together)  # a single frame is shown twice
        return qwen_patches.smart_resize(
            height, width, factor, settings.min_pixels, settings.max_pixels, num_frames, together
        )

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """From the first to the last, evenly spaced: 2 a second, or fps; at least 4, where there are so many."""
        from hawk_trt.models.qwen_video import DEFAULT_FPS, MIN_FRAMES

        wanted = int(total / video_fps * (DEFAULT_FPS if fps is None else fps))
        count = min(max(wanted, MIN_FRAMES), max_frames, total)
        numbers: IntArray = np.linspace(0, total - 1, count).round().astype(np.int64)
        return numbers

    def placeholder(self, item: Patches, special: SpecialTokens) -> tuple[str | TokenRun, ...]:
        """An image's placeholder once for each visual token; of a video each temporal patch's time and tokens.

        The time is the mean of the patch's first and last frame; the last frame is repeated where one is missing. The
        tokens lie between vision_start and vision_end, which the bundle's tokenizer may lack: then InvalidInput.
        """
        if item.kind == "image":
            return super().placeholder(item, special)
        start, video, end = special.vision_start, special.video, special.vision_end
        if start is None or video is None or end is None:
            raise InvalidInput(
                "prompt: this bundle's tokenizer lacks <|vision_start|>, <|video_pad|> or <|vision_end|>, which a "
                "video needs. Pass ModelInputs"
            )
        (steps, height, width), times = item.grid, item.times
        tokens = height * width // self.vision.spatial_merge_size**2
        frame = (TokenRun(start), TokenRun(video, tokens), TokenRun(end))
        together = -(-len(times) // steps)
        parts: list[str | TokenRun] = []
        for first in range(0, len(times), together):
            last = min(first + together, len(times)) - 1
            parts += [f"<{(times[first] + times[last]) / 2:.1f} seconds>", *frame]
        return tuple(parts)

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """Each frame of a video counts as an image."""
        frames = np.repeat(videos, videos[:, 0], axis=0)
        frames[:, 0] = 1
        return super().position_ids(visual_kind, images, frames, seconds)


@lru_cache(maxsize=qwen_patches.PLANS_KEPT)
def interpolation(height: int, width: int, merge: int, side: int) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """How the square table of positions, of a side, is resampled to a frame of height x width patches, bilinearly.

    Corners lie on corners. merge: patches on a side of a merge block. Returns four places in the flattened table and
    their weights for each patch, in the processor's order: int64 and float32 [num_patches, 4], read-only.
    """
    positions = qwen_patches.patch_positions(height, width, merge)
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
