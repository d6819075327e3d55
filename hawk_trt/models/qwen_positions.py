"""Multimodal rotary positions (mRoPE) of the Qwen line: time, height and width of every prompt token.

Text advances all three axes by one a token. An image or video that starts at position p takes
    time   p + floor(frame * second_per_grid_ts * tokens_per_second)     (an image: p)
    height p + row,  width p + column                                     (of its merged tokens)
and what follows it starts at its largest position on any axis + 1.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import IMAGE, TEXT, VIDEO, IntArray


def position_ids(
    visual_kind: npt.NDArray[np.int8],
    image_grid_thw: IntArray,
    video_grid_thw: IntArray,
    second_per_grid_ts: npt.NDArray[np.float32],
    merge: int,
    tokens_per_second: float,
) -> IntArray:
    """Positions of a prompt without padding, whose grids make as many tokens as it has placeholders.

    Args:
        visual_kind: [seq_len], 0 text, 1 image placeholder, 2 video placeholder.
        image_grid_thw: [images, 3], patches in time, height and width.
        video_grid_thw: [videos, 3].
        second_per_grid_ts: [videos], seconds that one temporal patch spans.
        merge: patches on a side of a visual token.
        tokens_per_second: of the time axis.

    Returns:
        int64 [3, seq_len]: time, height, width.

    Raises:
        InvalidInput: text lies between the placeholders of an image or video, which it names.
    """
    rate, still = np.float32(tokens_per_second), np.zeros(len(image_grid_thw), np.float32)
    items = {
        IMAGE: enumerate(zip(image_grid_thw.tolist(), still, strict=True)),
        VIDEO: enumerate(zip(video_grid_thw.tolist(), second_per_grid_ts, strict=True)),
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
            item, (grid, seconds) = next(items[kind])
            frames, high, wide = grid[0], grid[1] // merge, grid[2] // merge
            tokens = frames * high * wide
            if end - index < tokens:
                name = "image" if kind == IMAGE else "video"
                raise InvalidInput(
                    f"{name} {item}: got {end - index} placeholders in a row, expected {tokens} for its grid {grid}"
                )
            # In float32 as transformers does: the floor of a product differs from that in float64.
            time = np.floor(np.arange(frames, dtype=np.float32) * seconds * rate).astype(np.int64)
            axes = np.broadcast_arrays(time[:, None, None], np.arange(high)[:, None], np.arange(wide))
            block = start + np.stack(axes).reshape(3, -1)
            positions[:, index : index + tokens] = block
            index, start = index + tokens, int(block.max()) + 1
    return positions


def check_grid(name: str, grid_thw: npt.ArrayLike | None, merge: int) -> IntArray:
    """A grid as int64 [items, 3]; no items where there is none.

    Raises:
        InvalidInput: not [items, 3], not integers, below 1, or height or width no multiple of merge.
    """
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
