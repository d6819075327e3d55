"""Videos of the Qwen line: which frames of a file are taken, how large they become, and their patches.

A long video is decoded, resized and cut while the vision stage asks for its patches.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.models.family import Floats, Image, ImageSettings, IntArray, Patches, check_rgb
from hawk_trt.models.qwen_patches import cut
from hawk_trt.models.streamed_rows import StreamedRows
from hawk_trt.models.vision_config import Qwen2Vision

# How the Qwen2-VL processor samples a file: frames a second, and how many of them.
DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MULTIPLE = 2
# Videos of fewer patches (77 MB of Qwen2.5-VL's) become a plain array.
STREAMED_FROM_PATCHES = 16_385
# What Qwen's processors leave of the context for text, and by how much frames may always pass their least area.
_SHARE_OF_CONTEXT = 0.9
_OVER_LEAST = 1.05


def sample_indices(total: int, video_fps: float, fps: float | None, max_frames: int = MAX_FRAMES) -> IntArray:
    """Which frames of a file are taken: evenly spaced, an even number of them (one of a single frame).

    fps is the wanted rate, None is 2; at least 4 frames are taken, where there are so many. int64 [frames], ascending.
    """
    rate = DEFAULT_FPS if fps is None else fps
    wanted = min(max(total / video_fps * rate, MIN_FRAMES), max_frames, total)
    count = max(math.floor(wanted / FRAME_MULTIPLE) * FRAME_MULTIPLE, 1)
    # The processor's own arithmetic: float32 steps, truncated.
    return (np.arange(count) * (total / count)).astype(np.float32).astype(np.int64)


def max_frame_pixels(num_frames: int, settings: ImageSettings, vision: Qwen2Vision) -> int:
    """The largest area of a resized frame: the settings', or less where many frames share the context.

        share = floor(0.9 * max_video_tokens * (patch_size * merge)^2) * temporal_patch_size / num_frames

    It is the rule of the Qwen2-VL video processor's cap_pixels_per_frame.
    """
    if settings.max_video_tokens is None:
        return settings.max_pixels
    total = int(settings.max_video_tokens * vision.token_side**2 * _SHARE_OF_CONTEXT)
    total = min(total, settings.total_pixels or total)
    share = max(total * vision.temporal_patch_size // num_frames, int(settings.min_pixels * _OVER_LEAST))
    return min(settings.max_pixels, share)


def video_patches(
    frames: Sequence[Image],
    settings: ImageSettings,
    vision: Qwen2Vision,
    frame_size: Callable[[int, int, int, ImageSettings], tuple[int, int]],
) -> Patches:
    """Resize, normalise and cut the frames of one video; see Qwen2VL.video_to_patches, and its frame_size."""
    if not len(frames):
        raise InvalidInput("video: got no frame, expected at least one")
    first = frames[0]
    for number, frame in enumerate(frames if isinstance(frames, list | tuple) else ()):  # a file's: not decoded yet
        _check_frame(frame, number, first.shape)
    check_rgb(first)
    tall, wide = frame_size(len(frames), *settings.size_of(first), settings)
    patch, together = vision.patch_size, vision.temporal_patch_size
    steps, num_patches = -(-len(frames) // together), (tall // patch) * (wide // patch)

    def parts() -> Iterator[Floats]:
        """The patches of one temporal patch after another: float32 [num_patches, patch_dim] each."""
        tables = settings.value_tables()
        rows = np.empty((0, 0), np.float32)
        for number, frame in enumerate(frames):
            _check_frame(frame, number, first.shape)
            place, last = number % together, number == len(frames) - 1
            if place == 0:
                rows = np.empty((num_patches, vision.patch_dim), np.float32)
            resized = resize(frame, tall, wide, settings.resample)
            cut(resized, tables, rows, vision, slice(place, None if last else place + 1))
            if last or place == together - 1:
                yield rows

    rows = StreamedRows(steps * num_patches, vision.patch_dim, parts)
    pixels = rows if len(rows) >= STREAMED_FROM_PATCHES else np.asarray(rows)
    return Patches(pixels, np.array([(steps, tall // patch, wide // patch)], dtype=np.int64))


def _check_frame(frame: Image, number: int, shape: tuple[int, ...]) -> None:
    if frame.shape != shape:
        raise InvalidInput(f"video: frame {number} is {list(frame.shape)}, expected {list(shape)} as the first")
