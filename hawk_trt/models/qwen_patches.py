"""Patches and positions of the Qwen line: how large pictures are, how they are cut, where their tokens stand.

A patch is a row of [channel, temporal patch, patch, patch]. Patches lie in the order of the checkpoint's own processor:
frame by frame, in a frame by merge block (the m x m patches that become one token follow each other), blocks in raster
order. An image fills its temporal patch with itself.

Multimodal rotary positions (mRoPE) are time, height and width of every prompt token. Text advances all three axes by
one a token. An image or video that starts at position p takes
    time   p + floor(frame * second_per_grid_ts * tokens_per_second)     (an image: p)
    height p + row,  width p + column                                     (of its merged tokens)
and what follows it starts at its largest position on any axis + 1.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import IMAGE, TEXT, VIDEO, Floats, IntArray, Kinds, Patches
from hawk_trt.models.vision_config import Qwen2Vision

_MAX_ASPECT_RATIO = 200
PLANS_KEPT = 16  # of the last frame sizes


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, num_frames: int = 1, together: int = 1
) -> tuple[int, int]:
    """Height and width nearest to the given ones that are multiples of factor and within the pixel bounds.

    The bounds are of all frames together; `together` frames make a temporal patch.
    """
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        what = "image: got" if num_frames == 1 else "video: got frames of"
        raise InvalidInput(
            f"{what} {width} x {height} pixels, expected sides of at most 1 to {_MAX_ASPECT_RATIO}. Crop it"
        )
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / together) * together * tall * wide
    if volume > max_pixels:
        by = math.sqrt(num_frames * height * width / max_pixels)
        tall, wide = (max(factor, math.floor(side / by / factor) * factor) for side in (height, width))
    elif volume < min_pixels:
        by = math.sqrt(min_pixels / (num_frames * height * width))
        tall, wide = (math.ceil(side * by / factor) * factor for side in (height, width))
    return tall, wide


def cut(
    image: npt.NDArray[np.uint8],
    tables: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    vision: Qwen2Vision,
    places: slice,
) -> None:
    """Write the normalised patches of one resized image into rows [num_patches, patch_dim].

    tables: of ImageSettings.value_tables.  places: in the temporal patch that the image takes.
    """
    merge, patch, together = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    high, wide = image.shape[0] // vision.token_side, image.shape[1] // vision.token_side
    blocks = image.reshape(high, merge, patch, wide, merge, patch, 3).transpose(6, 0, 3, 1, 4, 2, 5)
    out = rows.reshape(high, wide, merge, merge, 3, together, patch, patch)
    for channel, table in enumerate(tables):
        out[:, :, :, :, channel, places] = table[blocks[channel]][:, :, :, :, None]


@lru_cache(maxsize=PLANS_KEPT)
def patch_positions(height: int, width: int, merge: int) -> IntArray:
    """Row and column of each of height x width patches, in the processor's order: int64 [num_patches, 2], read-only."""
    rows, columns = np.mgrid[:height, :width]
    positions = np.stack((rows, columns), axis=-1).astype(np.int64)
    by_block = positions.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    flat: IntArray = by_block.reshape(-1, 2)
    flat.flags.writeable = False  # shared by every call with this size
    return flat


def frame_batches(patches: Patches, vision: Qwen2Vision, max_patches: int) -> Iterator[tuple[Floats, int, int]]:
    """Cut images and videos into batches of frames of one size, in order; a single frame may exceed max_patches.

    Yields float32 [num_frames, num_patches, patch_dim], and the height and width of its frames in patches.
    """
    grid = check_grid("grid_thw", patches.grid_thw, vision.spatial_merge_size)
    pixels, dim, num_rows = patches.pixel_values, vision.patch_dim, int(grid.prod(axis=1).sum())
    got = f"pixel_values: got {pixels.dtype}{list(pixels.shape)}, expected"
    if pixels.ndim != 2 or pixels.shape[1] != dim or not np.issubdtype(pixels.dtype, np.floating):
        raise InvalidInput(f"{got} float32[num_patches, {dim}]")
    if len(pixels) != num_rows:
        raise InvalidInput(f"{got} {num_rows} rows for grid_thw {grid.tolist()}")
    start = 0
    for (height, width), items in groupby(grid.tolist(), key=lambda item: (item[1], item[2])):
        num_frames, num_patches = sum(item[0] for item in items), height * width
        frames_a_batch = max(1, max_patches // num_patches)
        for first in range(0, num_frames, frames_a_batch):
            end = start + min(frames_a_batch, num_frames - first) * num_patches
            yield pixels[start:end].astype(np.float32, copy=False).reshape(-1, num_patches, dim), height, width
            start = end


def position_ids(
    visual_kind: Kinds,
    images: IntArray,
    videos: IntArray,
    seconds: Floats,
    merge: int,
    tokens_per_second: float,
) -> IntArray:
    """Positions of a prompt without padding, whose grids make as many tokens as it has placeholders.

    visual_kind: [seq_len].  images, videos: their grid_thw, int64 [items, 3].  seconds: that one temporal patch of each
    video spans.  merge: patches on a side of a visual token.  tokens_per_second: of the time axis.

    Returns int64 [3, seq_len]: time, height, width.
    """
    rate, still = np.float32(tokens_per_second), np.zeros(len(images), np.float32)
    items = {
        IMAGE: enumerate(zip(images.tolist(), still, strict=True)),
        VIDEO: enumerate(zip(videos.tolist(), seconds, strict=True)),
    }
    positions = np.empty((3, len(visual_kind)), dtype=np.int64)
    start = 0  # on the axes
    edges = np.flatnonzero(np.diff(visual_kind, prepend=-1, append=-1)).tolist()
    for index, end in pairwise(edges):  # a run of text, or of one image or video or several
        kind = int(visual_kind[index])
        if kind == TEXT:
            positions[:, index:end] = start + np.arange(end - index)
            start += end - index
            continue
        while index < end:
            item, (grid, step) = next(items[kind])
            frames, high, wide = grid[0], grid[1] // merge, grid[2] // merge
            tokens = frames * high * wide
            if end - index < tokens:
                name = "image" if kind == IMAGE else "video"
                raise InvalidInput(
                    f"{name} {item}: got {end - index} placeholders in a row, expected {tokens} for its grid {grid}"
                )
            # In float32 as transformers does: the floor of a product differs from that in float64.
            time = np.floor(np.arange(frames, dtype=np.float32) * step * rate).astype(np.int64)
            axes = np.broadcast_arrays(time[:, None, None], np.arange(high)[:, None], np.arange(wide))
            block = start + np.stack(axes).reshape(3, -1)
            positions[:, index : index + tokens] = block
            index, start = index + tokens, int(block.max()) + 1
    return positions


def check_grid(name: str, grid_thw: npt.ArrayLike | None, merge: int) -> IntArray:
    """A grid as int64 [items, 3]; no items where there is none."""
    grid = np.asarray(() if grid_thw is None else grid_thw)
    if grid.size == 0:
        return np.empty((0, 3), dtype=np.int64)
    if grid.ndim != 2 or grid.shape[1] != 3 or not np.issubdtype(grid.dtype, np.integer):
        raise InvalidInput(f"{name}: got {grid.dtype}{list(grid.shape)}, expected int64[items, 3]")
    wrong = (grid < 1).any(axis=1) | (grid[:, 1:] % merge != 0).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidInput(
            f"{name}[{row}]: got {grid[row].tolist()}, expected at least one frame, "
            f"and height and width in patches that are multiples of {merge}"
        )
    return grid.astype(np.int64, copy=False)
