"""Videos whose frames show their numbers."""

from fractions import Fraction

import av
import numpy as np

from hawk_trt.inputs import video as videos
from hawk_trt.inputs.turns import VisualItem

BITS = 10


def load_video(source, **options):
    return videos.load_video(VisualItem("video", source, **options))


def numbered(number):
    """A frame that shows its number as black and white squares, and which way is up: uint8 [32, 160, 3]."""
    frame = np.zeros((32, 16 * BITS, 3), np.uint8)
    for bit in range(BITS):
        frame[:16, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    frame[16:] = (200, 30, 30)
    return frame


def number_of(frame):
    return sum(int(frame[8, 16 * bit + 8].mean() > 128) << bit for bit in range(BITS))


def write(path, frames, codec="libx264", fps=10, gop=12, options=None, container_options=None):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def timed(path, times_ms, codec="libx264"):
    """A video whose frame n is shown at times_ms[n]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 16 * BITS, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
