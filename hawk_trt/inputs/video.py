"""Videos as users bring them: a file, a list of images or an array in; RGB frames and their times out.

Frames given one by one are all used. A file is sampled by the family's rule; video_file.py decodes it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import load_image, local_path
from hawk_trt.inputs.turns import VisualItem
from hawk_trt.inputs.video_file import FileFrames, Frame, VideoIndex, index_file
from hawk_trt.models.qwen_video import DEFAULT_FPS, FRAME_MULTIPLE, MAX_FRAMES, sample_indices

if TYPE_CHECKING:
    from hawk_trt.request import VideoInput

# Frames of the file, its frames a second, those asked for, the most to take: int64 frame numbers, ascending.
FrameSampler: TypeAlias = Callable[[int, float, float | None, int], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Video:
    """The frames of a video that the model is to see.

    frames: uint8 [height, width, 3] each; those of a file are decoded anew whenever they are gone through, and a
    damaged file shows as InvalidInput then.  seconds_per_frame: from one of these frames to the next; times
    temporal_patch_size it is second_per_grid_ts.  times: seconds of each frame from the start of the video.
    """

    frames: Sequence[Frame]
    seconds_per_frame: float
    times: Sequence[float]


def load_video(
    item: "VisualItem | VideoInput",
    sampler: FrameSampler = sample_indices,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
) -> Video:
    """Open a video: a path (also file://), a sequence of images, or uint8 [frames, height, width, 3].

    item: one of these, or a VisualItem of it.  sampler: the family's rule for files.  fps, max_frames: as in
    VisualItem, which has its own.

    Raises InvalidInput: missing, unreadable, no video, without frames, or an option out of its range, or one that a
    list of frames cannot honour; BackendError: a file, and PyAV is not installed.
    """
    if not isinstance(item, VisualItem):
        item = VisualItem("video", item, fps=fps, max_frames=max_frames)
    source, start, end = item.source, item.start, item.end
    rate = DEFAULT_FPS if item.fps is None else item.fps
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidInput(f"fps: got {item.fps}, expected a number above 0, frames a second")
    for name in ("num_frames", "min_frames", "max_frames"):
        value = getattr(item, name)
        if value is not None and value < FRAME_MULTIPLE:
            raise InvalidInput(f"{name}: got {value}, expected at least {FRAME_MULTIPLE}")
    least, most = item.min_frames or 0, item.max_frames or MAX_FRAMES
    if item.num_frames is not None and (item.fps, item.min_frames, item.max_frames) != (None, None, None):
        raise InvalidInput("num_frames: got fps, min_frames or max_frames beside it, expected it alone")
    if least > most:
        raise InvalidInput(f"min_frames: got {least}, expected at most max_frames, {most}")
    if not 0 <= (start or 0.0) < (math.inf if end is None else end):
        raise InvalidInput(f"video_start, video_end: got {start} and {end}, expected 0 <= start < end, in seconds")
    if isinstance(source, str | os.PathLike):
        return _from_file(index_file(local_path(source, "video")), item, most, sampler)
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise InvalidInput(f"video: got {source.dtype}{list(source.shape)}, expected uint8[frames, height, width, 3]")
    if isinstance(source, bytes) or not isinstance(source, np.ndarray | Sequence):
        raise InvalidInput(f"video: got {type(source).__name__}, expected a path, a sequence of images or an array")
    count = len(source)
    if not count:
        raise InvalidInput("video: got no frame, expected at least one")
    fits = item.num_frames in (None, count) and least <= count <= (item.max_frames or count)
    if not fits or start is not None or end is not None:
        raise InvalidInput(
            f"video: got {count} frames in a list, all of which are used; num_frames, min_frames, max_frames, "
            "video_start and video_end choose from a file. Leave them out"
        )
    return Video([load_image(frame) for frame in source], 1.0 / rate, [number / rate for number in range(count)])


def _times(index: VideoIndex, timestamps: bool) -> npt.NDArray[np.float64]:
    """Seconds from the first frame to each: by the average rate, or by the file where they differ."""
    by_rate = np.arange(index.total) / index.fps
    if not timestamps or len(index.times) < 2:
        return by_rate
    told = (index.times - index.times[0]) * index.time_base
    # Closer than half a frame, only rounding differs: then a video of a constant rate is as in transformers.
    varies = np.abs(told - by_rate).max() > 0.5 / index.fps and told[-1] > 0
    return told if varies else by_rate


def _from_file(index: VideoIndex, item: VisualItem, most: int, sampler: FrameSampler) -> Video:
    """The frames to take of a file, at most so many."""
    shown, fps, num_frames, start, end = _times(index, item.timestamps), item.fps, item.num_frames, item.start, item.end
    constant = len(shown) < 2 or abs(shown[-1] * index.fps - (index.total - 1)) < 0.5
    rate = index.fps if constant else (index.total - 1) / float(shown[-1])
    near = 1e-6
    first = 0 if start is None else int(np.searchsorted(shown, start - near))
    last = index.total if end is None else int(np.searchsorted(shown, end + near))
    total = last - first
    if total < 1 or (num_frames or 0) > total:
        where = "" if start is None and end is None else f" from second {start or 0:g} to {end or shown[-1]:g}"
        raise InvalidInput(f"{index.path}: got {total} frames{where}, expected at least {num_frames or 1}")

    def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
        return sampler(total, rate, (count + 0.5) * rate / total, most)

    # a family may take even numbers alone: of those asked for the nearest, of the least the next
    if num_frames is not None:
        numbers = evenly(num_frames, num_frames)
        if len(numbers) != num_frames:
            even = round(num_frames / FRAME_MULTIPLE) * FRAME_MULTIPLE
            numbers = evenly(even, even)
    else:
        numbers = sampler(total, rate, fps, most)
        least = min(item.min_frames or 0, total)
        for count in (least, least + 1):
            numbers = evenly(count, most) if len(numbers) < least else numbers
    taken = tuple((numbers + first).tolist())
    return Video(FileFrames(index, taken), total / (len(taken) * rate), [float(shown[number]) for number in taken])
