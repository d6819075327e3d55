"""Frames of a video file by their numbers. PyAV decodes all but animated GIF, WebP and PNG, which Pillow does.

The packets are read once without decoding, which counts the frames exactly and finds the keyframes. Frames are
decoded while they are gone through, one at a time: an hour of video needs no more memory than a minute.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs.images import MAX_PIXELS, check_size, decoding, open_image, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Frame: TypeAlias = npt.NDArray[np.uint8]

# Ten days at 30 frames a second: more packets are a sample table that lies.
_MAX_PACKETS = 26_000_000
_MAX_TABLES_BYTES = 1 << 30
# What FFmpeg may open: files alone, and no playlist that names other files.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,h264,hevc,vvc,av1,obu,ivf,ogg,asf,m4v,mjpeg,"
    "gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,image2,nut,rm,dv,mxf,wtv,swf,y4m,yuv4mpegpipe,"
    "wav,mp3,flac,aac",
}
# Seeking throws away what the decoder has in flight: worth it from about a second of frames on.
_SEEK_FRAMES = 32
# A decoder may swallow hidden or incomplete frames at the very end: the last one given stands in for so many.
_TAIL_FRAMES = 4
_MAX_ANIMATED_PIXELS = 10_000_000_000
_DEFAULT_DURATION_MS = 100


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The frames of a video file; total: how many, fps: of them a second, on average.

    times: int64 [total], when each frame is shown, ascending, in steps of time_base seconds; empty where the file does
    not say.  key_numbers: numbers of the frames that decoding can start from, ascending; empty without times.
    key_times: where to seek for each of them.  animated: whether it is a GIF, WebP or PNG, which Pillow decodes.
    """

    path: Path
    fps: float
    total: int
    times: npt.NDArray[np.int64]
    time_base: float
    key_numbers: tuple[int, ...] = ()
    key_times: tuple[int, ...] = ()
    animated: bool = False


class FileFrames(Sequence[Frame]):
    """Frames of a file by their numbers (ascending), uint8 RGB [height, width, 3], decoded while gone through."""

    def __init__(self, index: VideoIndex, numbers: tuple[int, ...]) -> None:
        self._index = index
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Frame]:
        return _animation_frames(self._index.path, self._numbers) if self._index.animated else self._decode()

    @overload
    def __getitem__(self, item: int) -> Frame: ...
    @overload
    def __getitem__(self, item: slice) -> "FileFrames": ...
    def __getitem__(self, item: int | slice) -> "Frame | FileFrames":
        if isinstance(item, slice):
            return FileFrames(self._index, tuple(sorted(self._numbers[item])))
        return next(iter(FileFrames(self._index, (self._numbers[item],))))

    def _decode(self) -> Iterator[Frame]:
        with _opened(self._index.path) as (container, stream):
            stream.thread_type = "AUTO"
            size = stream.width, stream.height  # the stream's own follow its frames
            for picture in _pick(container, stream, self._index, self._numbers):
                yield _upright_rgb(picture, size, self._index.path)


def index_file(path: Path) -> VideoIndex:
    """The frames of a file, without decoding them.

    Raises InvalidInput: not a video, damaged, cut short, without frames or frame rate, or of too large a size;
    BackendError: PyAV is not installed.
    """
    durations_ms = _animation_durations(path)
    if durations_ms is not None:
        times = np.cumsum([0, *durations_ms])
        fps = 1000 * len(durations_ms) / int(times[-1])
        return VideoIndex(path, fps, len(durations_ms), times[:-1], 0.001, animated=True)
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    total, cut_short = 0, False
    _check_sample_tables(path)
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        time_base = float(stream.time_base or 0)
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            total, cut_short = total + 1, packet.is_corrupt
            if total > _MAX_PACKETS:
                raise InvalidInput(f"{path}: holds more than {_MAX_PACKETS:,} frames. Cut it into shorter videos")
            if packet.pts is not None:
                shown.append(packet.pts)
                if packet.is_keyframe:
                    # Files are indexed by decoding time: seeking by the later showing time may overshoot.
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if "mp4" in container.format.name:
            # a cut between two frames leaves no broken one, but an index in front tells where all would lie
            entries, size_bytes = getattr(stream, "index_entries", ()), path.stat().st_size  # of a newer PyAV
            cut_short |= any(entry.pos + entry.size > size_bytes for entry in entries)
    if not total:
        raise InvalidInput(f"{path}: holds no video frame. Get the file again, or give its frames as images")
    if cut_short:
        raise InvalidInput(f"{path}: cut short, frames are missing at its end. Get the file again")
    if not rate:
        raise InvalidInput(f"{path}: has no frame rate. Give its frames as images, with their fps")
    if len(shown) < total:  # frames can only be counted, and reached from the start
        shown, keys = [], []
    times = np.sort(np.array(shown, dtype=np.int64))
    keys.sort()
    return VideoIndex(
        path=path,
        fps=rate.numerator / rate.denominator,
        total=total,
        times=times,
        time_base=time_base,
        key_numbers=tuple(int(np.searchsorted(times, pts)) for pts, _ in keys),
        key_times=tuple(seek for _, seek in keys),
    )


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The container and its best video stream; what FFmpeg raises inside becomes InvalidInput."""
    try:
        import av  # PyAV is an extra: only video files need it
    except ImportError as error:
        raise BackendError("video files need PyAV. Install it: pip install av") from error
    try:
        # As a URL, so that no name of a folder ("http:") is taken for a protocol.
        with av.open(f"file:{path.absolute()}", options=_OPTIONS, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            cover = stream is not None and stream.disposition & av.stream.Disposition.attached_pic
            if stream is None or stream.codec_context is None or cover:
                raise InvalidInput(
                    f"{path}: holds no video that can be decoded. Convert it to MP4, or give its frames as images"
                )
            check_size(stream.width, stream.height, str(path))
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # later frames may be larger
            yield container, stream
    except av.FFmpegError as error:
        raise InvalidInput(
            f"{path}: not a video, or damaged ({error}). Convert it to MP4, or give its frames as images"
        ) from error


def _pick(
    container: "InputContainer", stream: "VideoStream", index: VideoIndex, numbers: Sequence[int]
) -> "Iterator[VideoFrame]":
    """The pictures of these numbers, skipping to keyframes where that pays; for one that is never shown, the next."""
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


def _number(picture: "VideoFrame", index: VideoIndex, following: int) -> int:
    """The number of a picture by its time; the following one where times say nothing, or several frames share it."""
    if picture.pts is None or not len(index.times) or picture.pts in index.times[following : following + 1]:
        return following
    return min(int(np.searchsorted(index.times, picture.pts)), index.total - 1)


def _upright_rgb(picture: "VideoFrame", size: tuple[int, int], path: Path) -> Frame:
    """A picture as uint8 [height, width, 3], turned as the file asks (phones film on their side)."""
    check_size(picture.width, picture.height, str(path))
    # A size that changes on the way is brought to that of the first frame: width and height.
    frame = picture.to_ndarray(format="rgb24", width=size[0], height=size[1])
    turns = round(picture.rotation / 90)  # counter-clockwise, as numpy counts
    return np.ascontiguousarray(np.rot90(frame, turns), dtype=np.uint8)


def _check_sample_tables(path: Path) -> None:
    """Refuse an MP4 that says it holds more frames than it has bytes: FFmpeg makes room for all of them."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at + 8 <= size_bytes:
            file.seek(at)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not kind.isalnum():
                return
            length = int.from_bytes(header[8:], "big") if length == 1 else length or size_bytes - at
            if kind == b"moov":
                file.seek(at)
                content = file.read(min(length, _MAX_TABLES_BYTES))
                for found in re.finditer(rb"stsz.{8}(.{4})|stz2.{8}(.{4})", content, re.DOTALL):
                    count = int.from_bytes(found[1] or found[2], "big")
                    if count > size_bytes:
                        raise InvalidInput(
                            f"{path}: damaged, it says {count:,} frames in {size_bytes:,} bytes. Get the file again"
                        )
            at += max(length, 8)


def _animation_durations(path: Path) -> list[int] | None:
    """Milliseconds of each frame of an animated GIF, WebP or PNG; None for any other file."""
    with path.open("rb") as file:
        head = file.read(12)
        if not head.startswith((b"GIF8", b"\x89PNG")) and (head[:4], head[8:]) != (b"RIFF", b"WEBP"):
            return None
        with decoding(str(path)), open_image(file, ("GIF", "PNG", "WEBP")) as image:
            check_size(image.width, image.height, str(path))
            still, count = _still_frames(image), getattr(image, "n_frames", 1)
            if count - still < 2:
                return None
            if count * image.width * image.height > _MAX_ANIMATED_PIXELS:
                raise InvalidInput(f"{path}: {count:,} frames of {image.width} x {image.height} are too many. Cut it")
            durations = []
            for number in range(still, count):
                image.seek(number)
                image.load()  # only then a WebP says how long it is shown
                durations.append(round(image.info.get("duration") or _DEFAULT_DURATION_MS))
            return durations


def _animation_frames(path: Path, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames of an animated GIF, WebP or PNG by their numbers (ascending), as load_image gives an image."""
    with path.open("rb") as file:
        with decoding(str(path)):
            image = open_image(file, ("GIF", "PNG", "WEBP"))
        for number in numbers:
            with decoding(str(path)):
                image.seek(number + _still_frames(image))
                frame = np.asarray(to_rgb(image, str(path)))
            yield frame


def _still_frames(image: Image.Image) -> int:
    """How many frames lie before the first of the animation: a PNG may have a picture for viewers without it."""
    return int(bool(image.info.get("default_image")))
