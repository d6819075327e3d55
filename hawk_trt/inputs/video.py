"""Videos as users bring them: a file, a list of images or an array in; RGB frames and their spacing out.

Frames given one by one are all used. A file is sampled as the Qwen2-VL video processor does; video_file.py
decodes it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs.images import load_image, local_path

if TYPE_CHECKING:
    from hawk_trt.request import VideoInput

# Frames of the file, its frames a second, those asked for, the most to take: int64 frame numbers, ascending.
FrameSampler: TypeAlias = Callable[[int, float, float | None, int], npt.NDArray[np.int64]]

DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MULTIPLE = 2


@dataclass(frozen=True, slots=True)
class Video:
    """The frames of a video that the model is to see.

    Attributes:
        frames: uint8 [height, width, 3] each; those of a file are decoded anew whenever they are gone through,
            and a damaged file shows as InvalidInput then.
        seconds_per_frame: from one of these frames to the next. second_per_grid_ts is this times
            temporal_patch_size.
        times: seconds of each frame from the start of the video.
    """

    frames: Sequence[npt.NDArray[np.uint8]]
    seconds_per_frame: float
    times: Sequence[float]


def load_video(
    source: "VideoInput",
    fps: float | None = None,
    max_frames: int | None = None,
    sampler: FrameSampler | None = None,
) -> Video:
    """Open a video.

    Args:
        source: a path (also file://), a sequence of images, or uint8 [frames, height, width, 3].
        fps: frames a second to sample from a file, or at which the given frames were taken; None is 2.
        max_frames: sampled from a file at most; None is 768.
        sampler: the family's rule for files, None for sample_indices.

    Raises:
        InvalidInput: missing, unreadable, no video, without frames, or fps is not above 0.
        BackendError: a file, and PyAV is not installed.
    """
    rate = DEFAULT_FPS if fps is None else fps
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidInput(f"fps: got {fps}, expected a number above 0, frames a second")
    most = MAX_FRAMES if max_frames is None else max_frames
    if most < FRAME_MULTIPLE:
        raise InvalidInput(f"max_frames: got {max_frames}, expected at least {FRAME_MULTIPLE}")
    if isinstance(source, str | os.PathLike):
        return _open_file(local_path(source, "video"), fps, most, sampler or sample_indices)
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise InvalidInput(f"video: got {source.dtype}{list(source.shape)}, expected uint8[frames, height, width, 3]")
    if isinstance(source, bytes) or not isinstance(source, np.ndarray | Sequence):
        raise InvalidInput(f"video: got {type(source).__name__}, expected a path, a sequence of images or an array")
    if not len(source):
        raise InvalidInput("video: got no frame, expected at least one")
    return Video([load_image(frame) for frame in source], 1.0 / rate, [number / rate for number in range(len(source))])


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


def _open_file(path: Path, fps: float | None, max_frames: int, sampler: FrameSampler) -> Video:
    try:
        from hawk_trt.inputs.video_file import FileFrames, index_file  # PyAV is an extra: only video files need it
    except ImportError as error:
        raise BackendError("video files need PyAV. Install it: pip install av") from error
    index = index_file(path)
    numbers = sampler(index.total, index.fps, fps, max_frames)
    taken = tuple(numbers.tolist())
    times = [number / index.fps for number in taken]
    return Video(FileFrames(index, taken), index.total / (len(taken) * index.fps), times)
