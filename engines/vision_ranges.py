"""How large the dynamic dimensions of a vision graph can get, from the visual tokens of one image.

One call of a vision engine takes one frame, or one tile: two dynamic dimensions whose product is bounded, frames and
patches, would make TensorRT plan memory for the largest of both at once.
"""

import math
from typing import NamedTuple

from hawk_trt.models.vision_config import Qwen25Vision, VisionConfig

# What the builder tunes for: an image of 1008 x 1008 pixels, the paper's fixed resolution.
TYPICAL_VISUAL_TOKENS = 1296
# Processors refuse an image whose one side is more than 200 times the other; rounding to blocks can add half of that.
_MAX_ASPECT_RATIO = 300


class Range(NamedTuple):
    """Smallest, tuned-for and largest size of a dimension."""

    low: int
    opt: int
    high: int


def vision_ranges(vision: VisionConfig, visual_tokens: int) -> dict[str, Range]:
    """Ranges of the vision dimensions of all families, by their word.

    A token is a block of merge x merge patches; a window is side x side blocks.

    Args:
        vision: sizes of the vision tower.
        visual_tokens: of the largest image.
    """
    merge = vision.spatial_merge_size
    patches = merge**2
    square = math.isqrt(min(visual_tokens, TYPICAL_VISUAL_TOKENS))
    ranges = {
        "num_frames": Range(1, 1, 1),
        "num_tiles": Range(1, 1, 1),
        "num_merged": Range(1, square**2, visual_tokens),
        "num_patches": Range(patches, square**2 * patches, visual_tokens * patches),
    }
    if isinstance(vision, Qwen25Vision):
        side = vision.window_side
        ranges["num_windows"] = Range(1, math.ceil(square / side) ** 2, _most_windows(visual_tokens, side))
        ranges["window_len"] = Range(patches, min(square, side) ** 2 * patches, side**2 * patches)
    return ranges


def _most_windows(blocks: int, side: int) -> int:
    """Windows of the frame of at most so many blocks that has the most: a long one, with windows cut at its edge."""
    shapes = ((high, min(blocks // high, high * _MAX_ASPECT_RATIO)) for high in range(1, math.isqrt(blocks) + 1))
    return max(math.ceil(high / side) * math.ceil(wide / side) for high, wide in shapes)
