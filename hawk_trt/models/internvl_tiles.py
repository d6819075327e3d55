"""From RGB images and video frames to the tiles of the InternVL vision tower.

An image is resized to the grid of square tiles whose shape is nearest to its own and cut into them, row by row; where
there is more than one, a small version of the whole, the thumbnail, follows as a tile of its own. A frame of a video is
one tile. Every tile becomes the same number of visual tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.models import normalisation
from hawk_trt.models.family import ImageSettings, IntArray, Patches
from hawk_trt.models.normalisation import value_tables, whole_number, wrong
from hawk_trt.models.vision_config import InternVLVision

# ImageNet's, which all checkpoints of the family have.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_BICUBIC = 3

Image = npt.NDArray[np.uint8]


def image_settings(preprocessor: Mapping[str, Any], vision: InternVLVision) -> ImageSettings:
    """Settings from preprocessor_config.json; its bounds of tiles become bounds of pixels.

    crop_to_patches is not read: the checkpoints' processors cut images into tiles whatever it says.

    Raises:
        CheckpointError: a setting that is not usable, or tiles of another size than the tower's.
    """
    side = vision.image_size
    size = preprocessor.get("size") or side
    sides = [value for value in size.values() if value is not None] if isinstance(size, Mapping) else [size]
    if not sides or any(value != side for value in sides):
        raise wrong("size", size, f"tiles of {side} x {side} pixels, as config.json says")

    def tiles(name: str, default: int) -> int:
        return whole_number(name, preprocessor.get(name), default, "a number of tiles")

    few, many = tiles("min_patches", vision.min_tiles), tiles("max_patches", vision.max_tiles)
    return normalisation.image_settings(preprocessor, (few * side**2, many * side**2), _MEAN, _STD)


def tile_grid(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiles of an image.

    The grid of the aspect ratio nearest to the image's, of fewest to most tiles; of equally near ones the smallest,
    or a larger one that the image fills by more than half.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        side: of a tile, in pixels.
        fewest: tiles at least.
        most: tiles at most.
    """
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= fewest
    ]
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        filled = height * width > 0.5 * side**2 * columns * rows
        if distance < best_distance or (distance == best_distance and filled):
            best, best_distance = (columns, rows), distance
    return best


def images_to_tiles(images: Sequence[Image], settings: ImageSettings, vision: InternVLVision) -> Patches:
    """Resize, cut and normalise images.

    Args:
        images: uint8 [height, width, 3] each.
        settings: pixel bounds (of all tiles but the thumbnail), filter and normalisation.
        vision: sizes of the vision tower.

    Returns:
        Tiles [tiles, 3, side, side], and a grid of [tiles, patches, patches] for each image.

    Raises:
        InvalidInput: an image that is not RGB uint8 or is empty.
    """
    side = vision.image_size
    most = max(1, settings.max_pixels // side**2)
    fewest = min(most, -(-settings.min_pixels // side**2))
    grids = []
    for image in images:
        _check(image)
        grids.append(tile_grid(image.shape[0], image.shape[1], side, fewest, most))
    thumbnails = [vision.use_thumbnail and columns * rows > 1 for columns, rows in grids]
    counts = [columns * rows + thumb for (columns, rows), thumb in zip(grids, thumbnails, strict=True)]
    pixels = np.empty((sum(counts), 3, side, side), dtype=np.float32)
    tables = value_tables(settings)
    start = 0
    for image, (columns, rows), thumb, count in zip(images, grids, thumbnails, counts, strict=True):
        _normalise(_cut(image, columns, rows, side, settings.resample), tables, pixels[start : start + columns * rows])
        if thumb:
            _normalise(_cut(image, 1, 1, side, settings.resample), tables, pixels[start + count - 1 : start + count])
        start += count
    return Patches(pixels, tile_grids(counts, vision))


def tiles_of(image: Image, count: int, vision: InternVLVision) -> Image:
    """The tiles that an image was cut into: uint8 [count, side, side, 3], the thumbnail last.

    Args:
        image: uint8 [height, width, 3].
        count: of its tiles, the thumbnail among them.
        vision: sizes of the vision tower.
    """
    side, thumb = vision.image_size, vision.use_thumbnail and count > 1
    columns, rows = tile_grid(image.shape[0], image.shape[1], side, count - thumb, count - thumb)
    tiles = _cut(image, columns, rows, side, _BICUBIC)
    return np.concatenate([tiles, _cut(image, 1, 1, side, _BICUBIC)]) if thumb else tiles


def video_to_tiles(frames: Sequence[Image], settings: ImageSettings, vision: InternVLVision) -> Patches:
    """Resize and normalise the frames of one video, one tile each, going through them once.

    Args:
        frames: uint8 [height, width, 3] each.
        settings: filter and normalisation of videos.
        vision: sizes of the vision tower.

    Raises:
        InvalidInput: no frame, or a frame that is not RGB uint8 or is empty.
    """
    if not len(frames):
        raise InvalidInput("video: got no frame, expected at least one")
    side = vision.image_size
    pixels = np.empty((len(frames), 3, side, side), dtype=np.float32)
    tables = value_tables(settings)
    for number, frame in enumerate(frames):
        _check(frame)
        _normalise(_cut(frame, 1, 1, side, settings.resample), tables, pixels[number : number + 1])
    return Patches(pixels, tile_grids([len(frames)], vision))


def tile_grids(counts: Sequence[int], vision: InternVLVision) -> IntArray:
    """The grid_thw of items of so many tiles: int64 [items, 3], a tile as a step in time."""
    patches = vision.tile_patches
    return np.array([(count, patches, patches) for count in counts], dtype=np.int64).reshape(-1, 3)


def _cut(image: Image, columns: int, rows: int, side: int, resample: int) -> Image:
    """Resize to a grid of tiles and cut it: uint8 [tiles, side, side, 3], row by row."""
    whole = resize(image, rows * side, columns * side, resample)
    tiles: Image = whole.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    return tiles


def _normalise(tiles: Image, tables: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    """Write uint8 [tiles, side, side, 3], normalised, into float32 [tiles, 3, side, side]."""
    for channel, table in enumerate(tables):
        out[:, channel] = table[tiles[..., channel]]


def _check(image: Image) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(f"image: got {image.dtype}{list(image.shape)}, expected uint8[height, width, 3]")
