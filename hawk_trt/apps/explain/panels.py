"""The panels of a picture: one image with its scores as a heat map, or with its dropped tokens dimmed."""

import numpy as np
import numpy.typing as npt
from PIL import Image

# Neither white nor black, so that dropped tokens differ from kept ones on any image.
_DIM = (200, 206, 214)
_DIM_SHARE = 0.78
_HEAT_SHARE = 0.62
_OUTLINE = (214, 51, 108)
# Viridis at ten even steps: perceptually uniform, and readable without colour vision.
_RAMP = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 73, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (109, 205, 89),
        (180, 222, 44),
        (253, 231, 37),
    ],
    np.float64,
)


def colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """The ramp's colours of values in [0, 1], clipped: uint8 [..., 3]."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    steps = np.arange(len(_RAMP))
    channels = [np.interp(place, steps, _RAMP[:, channel]).round().astype(np.uint8) for channel in range(3)]
    return np.stack(channels, -1)


def heat_panel(image: Image.Image, scores: npt.NDArray[np.float32], score_range: tuple[float, float]) -> Image.Image:
    """The image in grey under its scores in colour.

    Args:
        image: RGB.
        scores: float32 [height, width] of the token grid.
        score_range: the scores at the ends of the ramp.
    """
    low, high = score_range
    share = (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)
    colour = colours(share)[_cells(scores.shape, image.size)]
    return Image.fromarray(_blend(_grey(image), colour, _HEAT_SHARE))


def kept_panel(image: Image.Image, kept: npt.NDArray[np.bool_]) -> Image.Image:
    """The image with its dropped tokens grey and pale, and a line around the kept ones where cells are large enough.

    Args:
        image: RGB.
        kept: bool [height, width] of the token grid.
    """
    mask = kept[_cells(kept.shape, image.size)]
    pixels = np.where(mask[..., None], np.asarray(image), _blend(_grey(image), _DIM, _DIM_SHARE))
    cell = min(image.height / kept.shape[0], image.width / kept.shape[1])
    line = 2 if cell >= 12 else 1 if cell >= 6 else 0
    if line:
        pixels[mask & ~_inside(mask, line)] = _OUTLINE
    return Image.fromarray(pixels)


def _inside(mask: npt.NDArray[np.bool_], depth: int) -> npt.NDArray[np.bool_]:
    """The pixels whose neighbourhood of that depth lies in the mask; the border of the image is no edge."""
    size = 2 * depth + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, depth, constant_values=True), (size, size))
    inside: npt.NDArray[np.bool_] = np.logical_and.reduce(windows, axis=(-2, -1))
    return inside


def _cells(grid: tuple[int, ...], size: tuple[int, int]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Index of the token under each pixel of a panel of that size (width, height)."""
    rows, columns = np.arange(size[1]) * grid[0] // size[1], np.arange(size[0]) * grid[1] // size[0]
    return rows[:, None], columns[None]


def _grey(image: Image.Image) -> npt.NDArray[np.float32]:
    return np.asarray(image.convert("L"), np.float32)[..., None]


def _blend(image: npt.NDArray[np.float32], colour: npt.ArrayLike, share: float) -> npt.NDArray[np.uint8]:
    blended: npt.NDArray[np.uint8] = (image * (1.0 - share) + np.asarray(colour) * share).round().astype(np.uint8)
    return blended
