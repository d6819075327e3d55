"""Multimodal rotary positions (mRoPE) of Qwen2-VL and Qwen2.5-VL: time, height and width of every prompt token.

Text advances all three axes by one a token. An image or video that starts at position p takes
    time   p + floor(frame * second_per_grid_ts * tokens_per_second)     (an image: p)
    height p + row,  width p + column                                     (of its merged tokens)
and what follows it starts at its largest position on any axis + 1.
"""

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import IMAGE, VIDEO, IntArray

_KINDS = {IMAGE: "image", VIDEO: "video"}


def position_ids(
    visual_kind: npt.NDArray[np.int8],
    image_grid_thw: npt.NDArray[np.int64],
    video_grid_thw: npt.NDArray[np.int64],
    second_per_grid_ts: npt.NDArray[np.float32],
    merge: int,
    tokens_per_second: float,
) -> npt.NDArray[np.int64]:
    """Positions of a prompt without padding.

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
        InvalidInput: placeholders and grids do not fit each other; it names the image or video.
    """
    grids = {
        IMAGE: check_grid("image_grid_thw", image_grid_thw, merge).tolist(),
        VIDEO: check_grid("video_grid_thw", video_grid_thw, merge).tolist(),
    }
    seconds = _check_seconds(second_per_grid_ts, len(grids[VIDEO]))
    positions = np.empty((3, len(visual_kind)), dtype=np.int64)
    taken = {IMAGE: 0, VIDEO: 0}
    index = start = 0  # in the prompt, and on the axes
    for length, kind in _runs(visual_kind):
        end = index + length
        if kind not in _KINDS:
            positions[:, index:end] = start + np.arange(length)
            index, start = end, start + length
        while index < end:
            item = taken[kind]
            taken[kind] += 1
            tokens = _check_item(kind, item, grids[kind], end - index, merge)
            rate = np.float32(tokens_per_second) if kind == VIDEO else np.float32(0)
            block = start + _item_positions(grids[kind][item], merge, seconds[item] if kind == VIDEO else rate, rate)
            positions[:, index : index + tokens] = block
            index, start = index + tokens, int(block.max()) + 1
    for kind, name in _KINDS.items():
        if taken[kind] != len(grids[kind]):
            raise InvalidInput(
                f"{name}_grid_thw: got {len(grids[kind])} {name}s, "
                f"but the prompt holds placeholders for {taken[kind]} of them"
            )
    return positions


def check_grid(name: str, grid_thw: npt.NDArray[np.int64], merge: int) -> npt.NDArray[np.int64]:
    """Return the grid as int64 [items, 3], or say what is wrong with it.

    Raises:
        InvalidInput: not [items, 3], not integers, below 1, or height or width no multiple of merge.
    """
    grid = np.asarray(grid_thw)
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


def item_grid(name: str, values: npt.ArrayLike | None, merge: int) -> IntArray:
    """A grid of a prompt's inputs, checked as check_grid does; no items where there is none."""
    if values is None:
        return np.zeros((0, 3), np.int64)
    grid = np.asarray(values)
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype.kind not in "iu" or (grid < 1).any():
        raise InvalidInput(f"{name}: got {grid.dtype}{list(grid.shape)}, expected int64[items, 3] of at least 1 each")
    return check_grid(name, grid, merge)


def _item_positions(grid: list[int], merge: int, seconds: np.float32, rate: np.float32) -> npt.NDArray[np.int64]:
    """Positions of an item's merged tokens from its own start: int64 [3, tokens].

    In float32 as transformers does: the floor of a product differs from that in float64.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    time = np.floor(np.arange(frames, dtype=np.float32) * seconds * rate).astype(np.int64)
    axes = np.broadcast_arrays(time[:, None, None], np.arange(height)[:, None], np.arange(width))
    return np.stack(axes).reshape(3, -1)


def _check_item(kind: int, item: int, grids: list[list[int]], available: int, merge: int) -> int:
    """Placeholders that an item takes, if so many are there in a row."""
    name = _KINDS[kind]
    if item >= len(grids):
        raise InvalidInput(
            f"input_ids: got {name} placeholders for more than the {len(grids)} {name}s of {name}_grid_thw "
            f"({available} are left over)"
        )
    frames, height, width = grids[item]
    tokens = frames * height * width // merge**2
    if available < tokens:
        raise InvalidInput(
            f"{name} {item}: got {available} placeholders in a row, expected {tokens} for its grid {grids[item]}"
        )
    return tokens


def _check_seconds(seconds: npt.NDArray[np.float32], videos: int) -> npt.NDArray[np.float32]:
    values = np.asarray(seconds, dtype=np.float32).reshape(-1)
    if len(values) != videos:
        raise InvalidInput(f"second_per_grid_ts: got {len(values)} values, expected {videos}, one a video")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise InvalidInput(f"second_per_grid_ts: got {values.tolist()}, expected finite seconds of at least 0")
    return values


def _runs(kinds: npt.NDArray[np.int8]) -> list[tuple[int, int]]:
    """Lengths and values of the runs of equal values."""
    if not len(kinds):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(kinds)) + 1))
    lengths = np.diff(np.append(starts, len(kinds)))
    return list(zip(lengths.tolist(), kinds[starts].tolist(), strict=True))
