"""From RGB images to the patches of the Qwen vision towers; qwen_video.py does the same for videos.

An image is resized to multiples of patch x merge within the settings' pixel bounds, normalised, and cut into
rows of [channel, temporal patch, patch, patch], ordered by merge block: the m x m patches that become one
token follow each other. An image fills its temporal patch with itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.models import normalisation
from hawk_trt.models.family import ImageSettings, Patches
from hawk_trt.models.normalisation import object_of, value_tables, whole_number
from hawk_trt.models.vision_config import VisionConfig

MAX_ASPECT_RATIO = 200

# What the Qwen2-VL processor takes where preprocessor_config.json does not say.
_MIN_PIXELS = 56 * 56
_MAX_PIXELS = 28 * 28 * 1280
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def image_settings(preprocessor: Mapping[str, Any]) -> ImageSettings:
    """Settings from preprocessor_config.json, or from video_preprocessor_config.json for videos.

    The pixel bounds are min_pixels and max_pixels, else those of size, by either of its two spellings.

    Raises:
        CheckpointError: a setting that is not usable.
    """
    size = object_of(preprocessor, "size")

    def bound(name: str, edge: str, default: int) -> int:
        found = [value for value in (preprocessor.get(name), size.get(edge), size.get(name)) if value is not None]
        return whole_number(name, found[0] if found else None, default, "a number of pixels")

    pixels = (bound("min_pixels", "shortest_edge", _MIN_PIXELS), bound("max_pixels", "longest_edge", _MAX_PIXELS))
    return normalisation.image_settings(preprocessor, pixels, _MEAN, _STD)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width nearest to the given ones that are multiples of factor and within the pixel bounds.

    Raises:
        InvalidInput: a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidInput(
            f"image: got {width} x {height} pixels, expected sides of at most 1 to {MAX_ASPECT_RATIO}. Crop it"
        )
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def images_to_patches(
    images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings, vision: VisionConfig
) -> Patches:
    """Resize, normalise and cut images; each becomes one frame.

    Args:
        images: uint8 [height, width, 3] each.
        settings: pixel bounds, filter and normalisation.
        vision: sizes of the vision tower.

    Raises:
        InvalidInput: an image that is not RGB uint8, is empty, or is too thin.
    """
    sizes = [target_size(image, settings, vision) for image in images]
    patch = vision.patch_size
    grid = np.array([(1, tall // patch, wide // patch) for tall, wide in sizes], dtype=np.int64).reshape(-1, 3)
    pixels = np.empty((int(grid.prod(axis=1).sum()), vision.patch_dim), dtype=np.float32)
    tables = value_tables(settings)
    ends = np.cumsum(grid.prod(axis=1)).tolist()
    for image, (tall, wide), count, end in zip(images, sizes, grid.prod(axis=1).tolist(), ends, strict=True):
        resized = resize(image, tall, wide, settings.resample)
        cut(resized, tables, pixels[end - count : end], vision, slice(None))
    return Patches(pixels, grid)


def cut(
    image: npt.NDArray[np.uint8],
    tables: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    vision: VisionConfig,
    places: slice,
) -> None:
    """Write the normalised patches of one resized image into rows [num_patches, patch_dim].

    places: the places in the temporal patch that the image takes.
    """
    merge, patch, together = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    high, wide = image.shape[0] // (merge * patch), image.shape[1] // (merge * patch)
    blocks = image.reshape(high, merge, patch, wide, merge, patch, 3).transpose(6, 0, 3, 1, 4, 2, 5)
    out = rows.reshape(high, wide, merge, merge, 3, together, patch, patch)
    for channel, table in enumerate(tables):
        out[:, :, :, :, channel, places] = table[blocks[channel]][:, :, :, :, None]


def target_size(image: npt.NDArray[np.uint8], settings: ImageSettings, vision: VisionConfig) -> tuple[int, int]:
    """Height and width that an image is resized to.

    Raises:
        InvalidInput: it is not RGB uint8, is empty, or too thin.
    """
    check_rgb(image)
    factor = vision.token_side
    height, width = settings.resized or image.shape[:2]
    return smart_resize(height, width, factor, settings.min_pixels, settings.max_pixels)


def check_rgb(image: npt.NDArray[np.uint8]) -> None:
    """Refuse what is no RGB image.

    Raises:
        InvalidInput: it is not uint8 [height, width, 3], or empty.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(f"image: got {image.dtype}{list(image.shape)}, expected uint8[height, width, 3]")
