"""From the frames of a video to the patches of the Qwen vision towers.

temporal_patch_size successive frames make one temporal patch; the last frame is repeated to fill its own. Frames of a
long video are decoded, resized and cut while the vision stage asks for them: see streamed_rows.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.family import ImageSettings, Patches
from hawk_trt.models.normalisation import value_tables
from hawk_trt.models.qwen_patches import check_rgb, cut, target_size
from hawk_trt.models.vision_config import VisionConfig

# How the Qwen2-VL processor samples a file: frames a second, and how many of them.
DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MULTIPLE = 2

# Of a frame, where a checkpoint says no bounds for videos: what Qwen's own examples take.
MAX_FRAME_PIXELS = 768 * 28 * 28
# Videos of fewer patches (77 MB of Qwen2.5-VL's) become a plain array.
STREAMED_FROM_PATCHES = 16_385

# What Qwen's processors leave of the context for text, and by how much frames may always pass their least area.
_SHARE_OF_CONTEXT = 0.9
_OVER_LEAST = 1.05

Frames = Sequence[npt.NDArray[np.uint8]]


def video_to_patches(
    frames: Frames,
    settings: ImageSettings,
    vision: VisionConfig,
    frame_size: Callable[[int, int], tuple[int, int]] | None = None,
) -> Patches:
    """Resize, normalise and cut the frames of one video.

    Args:
        frames: uint8 [height, width, 3] each, all of one size; gone through while the patches are read.
        settings: pixel bounds, filter and normalisation of videos.
        vision: sizes of the vision tower.
        frame_size: height and width of the resized frames from those given; None takes an image's rule, within the
            video's share of the context.

    Raises:
        InvalidInput: no frame, a frame that is not RGB uint8, is too thin or of another size.
    """
    if not len(frames):
        raise InvalidInput("video: got no frame, expected at least one")
    for number, frame in enumerate(frames if isinstance(frames, list | tuple) else ()):  # a file's are not decoded yet
        _check_frame(frame, number, frames[0].shape)
    first = frames[0]
    check_rgb(first)
    bounded = replace(settings, max_pixels=max_frame_pixels(len(frames), settings, vision))
    tall, wide = (
        target_size(first, bounded, vision)
        if frame_size is None
        else frame_size(*(settings.resized or first.shape[:2]))
    )
    patch, steps = vision.patch_size, -(-len(frames) // vision.temporal_patch_size)
    grid = (steps, tall // patch, wide // patch)

    def parts() -> Iterator[npt.NDArray[np.float32]]:
        return _steps(frames, first.shape, grid, settings, vision)

    rows = StreamedRows(math.prod(grid), vision.patch_dim, parts)
    pixels = rows if len(rows) >= STREAMED_FROM_PATCHES else np.asarray(rows)
    return Patches(pixels, np.array([grid], dtype=np.int64))


def sample_indices(
    total: int, video_fps: float, fps: float | None, max_frames: int = MAX_FRAMES
) -> npt.NDArray[np.int64]:
    """Which frames of a file are taken: evenly spaced, an even number of them (one of a single frame).

    Args:
        total: frames of the file.
        video_fps: its frames a second.
        fps: frames a second wanted, None is 2; at least 4 frames are taken, where there are so many.
        max_frames: taken at most.

    Returns:
        int64 [frames], ascending.
    """
    rate = DEFAULT_FPS if fps is None else fps
    wanted = min(max(total / video_fps * rate, MIN_FRAMES), max_frames, total)
    count = max(math.floor(wanted / FRAME_MULTIPLE) * FRAME_MULTIPLE, 1)
    # The processor's own arithmetic: float32 steps, truncated.
    return (np.arange(count) * (total / count)).astype(np.float32).astype(np.int64)


def max_frame_pixels(num_frames: int, settings: ImageSettings, vision: VisionConfig) -> int:
    """The largest area of a resized frame: the settings', or less where many frames share the context.

        share = floor(0.9 * max_video_tokens * (patch_size * merge)^2) * temporal_patch_size / num_frames

    It is the rule of the Qwen2-VL video processor's cap_pixels_per_frame.
    """
    if settings.max_video_tokens is None:
        return settings.max_pixels
    token_pixels = vision.token_side**2
    total = int(settings.max_video_tokens * token_pixels * _SHARE_OF_CONTEXT)
    total = min(total, settings.total_pixels or total)
    share = max(total * vision.temporal_patch_size // num_frames, int(settings.min_pixels * _OVER_LEAST))
    return min(settings.max_pixels, share)


def _steps(
    frames: Frames,
    shape: tuple[int, ...],
    grid: tuple[int, int, int],
    settings: ImageSettings,
    vision: VisionConfig,
) -> Iterator[npt.NDArray[np.float32]]:
    """The patches of one temporal patch after another: float32 [height * width, patch_dim] each."""
    patch, together = vision.patch_size, vision.temporal_patch_size
    tables = value_tables(settings)
    rows = np.empty((0, 0), np.float32)
    for number, frame in enumerate(frames):
        _check_frame(frame, number, shape)
        place = number % together
        if place == 0:
            rows = np.empty((grid[1] * grid[2], vision.patch_dim), np.float32)
        last = number == len(frames) - 1
        resized = resize(frame, grid[1] * patch, grid[2] * patch, settings.resample)
        cut(resized, tables, rows, vision, slice(place, None if last else place + 1))
        if last or place == together - 1:
            yield rows


def _check_frame(frame: npt.NDArray[np.uint8], number: int, shape: tuple[int, ...]) -> None:
    if frame.shape != shape:
        raise InvalidInput(f"video: frame {number} is {list(frame.shape)}, expected {list(shape)} as the first")
