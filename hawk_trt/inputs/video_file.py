"""Frames of a video file by their numbers. Needs PyAV.

The packets are read once without decoding, which counts the frames exactly and finds the keyframes. Frames are
decoded while they are gone through, one at a time: an hour of video needs no more memory than a minute.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import check_size

# Seeking throws away what the decoder has in flight: worth it from about a second of frames on.
_SEEK_FRAMES = 32
# A decoder may swallow hidden or incomplete frames at the very end: the last one given stands in for so many.
_TAIL_FRAMES = 4

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The frames of a video file.

    Attributes:
        path: the file.
        fps: frames a second, on average.
        total: number of frames.
        times: int64 [total], when each frame is shown, in the stream's time base, ascending; empty where the file
            does not say.
        key_numbers: numbers of the frames that decoding can start from, ascending; empty without times.
        key_times: where to seek for each of them.
    """

    path: Path
    fps: float
    total: int
    times: npt.NDArray[np.int64]
    key_numbers: tuple[int, ...]
    key_times: tuple[int, ...]


class FileFrames(Sequence[Frame]):
    """Frames of a file by their numbers (ascending), uint8 RGB [height, width, 3], decoded while gone through."""

    def __init__(self, index: VideoIndex, numbers: tuple[int, ...]) -> None:
        self._index = index
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Frame]:
        return _decode(self._index, self._numbers)

    @overload
    def __getitem__(self, item: int) -> Frame: ...
    @overload
    def __getitem__(self, item: slice) -> "FileFrames": ...
    def __getitem__(self, item: int | slice) -> "Frame | FileFrames":
        if isinstance(item, slice):
            return FileFrames(self._index, tuple(sorted(self._numbers[item])))
        return next(_decode(self._index, (self._numbers[item],)))


def index_file(path: Path) -> VideoIndex:
    """Read the packets of a video.

    Raises:
        InvalidInput: not a video, damaged, cut short, without frames or frame rate, or of too large a size.
    """
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    total, cut_short = 0, False
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            check_size(stream.width, stream.height, str(path))
            rate = stream.average_rate or stream.guessed_rate
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                total, cut_short = total + 1, packet.is_corrupt
                if packet.pts is not None:
                    shown.append(packet.pts)
                    if packet.is_keyframe:
                        # Files are indexed by decoding time: seeking by the later showing time may overshoot.
                        keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    except av.FFmpegError as error:
        raise _unreadable(path, error) from error
    if not total:
        raise InvalidInput(f"{path}: holds no video frame. Get the file again, or give its frames as images")
    if cut_short:
        raise InvalidInput(f"{path}: cut short, its last frame is incomplete. Get the file again")
    if not rate:
        raise InvalidInput(f"{path}: states no frame rate. Give its frames as images, with their fps")
    if len(shown) < total:  # frames can only be counted, and reached from the start
        shown, keys = [], []
    times = np.sort(np.array(shown, dtype=np.int64))
    keys.sort()
    return VideoIndex(
        path=path,
        fps=rate.numerator / rate.denominator,
        total=total,
        times=times,
        key_numbers=tuple(int(np.searchsorted(times, pts)) for pts, _ in keys),
        key_times=tuple(seek for _, seek in keys),
    )


def _decode(index: VideoIndex, numbers: Sequence[int]) -> Iterator[Frame]:
    """Decode the frames with these numbers (ascending)."""
    try:
        with av.open(str(index.path)) as container:
            stream = _video_stream(container, index.path)
            stream.thread_type = "AUTO"
            for picture in _pick(container, stream, index, numbers):
                yield _upright_rgb(picture, stream)
    except av.FFmpegError as error:
        raise _unreadable(index.path, error) from error


def _pick(
    container: InputContainer, stream: VideoStream, index: VideoIndex, numbers: Sequence[int]
) -> Iterator[VideoFrame]:
    """The pictures with these numbers, skipping ahead to keyframes where that pays.

    A frame that is never shown is replaced by the next one.
    """
    key_numbers = index.key_numbers
    pictures = container.decode(stream)
    picture: VideoFrame | None = None
    at = -1  # number of picture
    for wanted in numbers:
        key = bisect_right(key_numbers, wanted) - 1
        sought = key >= 0 and key_numbers[key] > at + _SEEK_FRAMES
        if sought:
            container.seek(index.key_times[key], stream=stream)
            pictures = container.decode(stream)
        while at < wanted and (following := next(pictures, None)) is not None:
            picture, at = following, _number(following, index, at + 1)
            if sought and (at > wanted or index.times[at] != picture.pts):
                # Seeking is not exact in this format: go through the file from its start instead.
                key_numbers = ()
                container.seek(index.key_times[0], stream=stream)
                pictures, at = container.decode(stream), -1
            sought = False
        if picture is None or wanted - at > _TAIL_FRAMES:
            raise InvalidInput(
                f"{index.path}: decodes to {at + 1} frames, expected {index.total}; it is damaged. Get the file again"
            )
        yield picture


def _number(picture: VideoFrame, index: VideoIndex, following: int) -> int:
    """The number of a picture by its time, or the following one where times say nothing."""
    if picture.pts is None or not len(index.times):
        return following
    return min(int(np.searchsorted(index.times, picture.pts)), index.total - 1)


def _upright_rgb(picture: VideoFrame, stream: VideoStream) -> Frame:
    """A picture as uint8 [height, width, 3], turned as the file asks (phones film on their side)."""
    # A size that changes on the way is brought to that of the stream.
    frame = picture.to_ndarray(format="rgb24", width=stream.width, height=stream.height)
    turns = round(picture.rotation / 90)  # counter-clockwise, as numpy counts
    return np.ascontiguousarray(np.rot90(frame, turns), dtype=np.uint8)


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    streams = container.streams.video
    if not streams or streams[0].codec_context is None:
        raise InvalidInput(
            f"{path}: holds no video that can be decoded. Convert it to MP4, or give its frames as images"
        )
    return streams[0]


def _unreadable(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"{path}: not a video, or damaged ({error}). Convert it to MP4, or give its frames as images")
