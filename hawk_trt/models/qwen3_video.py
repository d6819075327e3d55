"""Videos as Qwen3-VL takes them: which frames of a file, how large, and the times that the prompt tells.

The pixel bounds of video_preprocessor_config.json are of all frames together, so longer videos get smaller frames.
"""

import math
from collections.abc import Sequence

import numpy as np

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import IntArray, TokenRun
from hawk_trt.models.qwen_patches import MAX_ASPECT_RATIO
from hawk_trt.models.qwen_video import DEFAULT_FPS, MIN_FRAMES


def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
    """Which frames of a file are taken: from the first to the last, evenly spaced.

    Args:
        total: frames of the file.
        video_fps: its frames a second.
        fps: frames a second wanted, None is 2; at least 4 frames are taken, where there are so many.
        max_frames: taken at most.

    Returns:
        int64 [frames], ascending.
    """
    wanted = int(total / video_fps * (DEFAULT_FPS if fps is None else fps))
    count = min(max(wanted, MIN_FRAMES), max_frames, total)
    numbers: IntArray = np.linspace(0, total - 1, count).round().astype(np.int64)
    return numbers


def frame_size(
    num_frames: int, height: int, width: int, factor: int, together: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width of the frames, multiples of factor, near the given ones and within the pixel bounds.

    Args:
        num_frames: of the video, at least 1.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        factor: pixels on a side of a token.
        together: frames of one temporal patch.
        min_pixels: of all frames together.
        max_pixels: of all frames together.

    Raises:
        InvalidInput: a side more than 200 times the other.
    """
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
    if volume > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if volume < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def video_text(
    grid: Sequence[int], tokens_a_frame: int, times: Sequence[float], special: SpecialTokens
) -> tuple[str | TokenRun, ...]:
    """A video in the prompt: for each temporal patch its time, then its tokens between vision_start and vision_end.

    The time is the mean of the patch's first and last frame; the last frame is repeated where one is missing.

    Args:
        grid: the video's row of grid_thw.
        tokens_a_frame: visual tokens of one temporal patch.
        times: seconds of each frame that was taken, from the start of the video.
        special: the ids of the tokens.
    """
    start, video, end = special.vision_start, special.video, special.vision_end
    if start is None or video is None or end is None:
        raise InvalidInput(
            "prompt: this bundle's tokenizer lacks <|vision_start|>, <|video_pad|> or <|vision_end|>, which a video "
            "needs. Pass ModelInputs"
        )
    together = -(-len(times) // grid[0])
    parts: list[str | TokenRun] = []
    for first in range(0, len(times), together):
        last = min(first + together, len(times)) - 1
        seconds = (times[first] + times[last]) / 2
        parts += [f"<{seconds:.1f} seconds>", TokenRun(start), TokenRun(video, tokens_a_frame), TokenRun(end)]
    return tuple(parts)
