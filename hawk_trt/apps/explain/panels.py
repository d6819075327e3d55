"""The panels of a picture: one image with its scores as a heat map, or with its dropped tokens dimmed."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageColor, ImageFilter

# Neither white nor black, so that dropped tokens differ from kept ones on any image.
_DIM = (200, 206, 214)
_DIM_SHARE = 0.78
_HEAT_SHARE = 0.62
_OUTLINE = (214, 51, 108)
# Viridis at ten even steps: perceptually uniform, and readable without colour vision.
_STEPS = "#440154 #482878 #3e4989 #31688e #26828e #1f9e89 #35b779 #6dcd59 #b4de2c #fde725"
_RAMP = np.array([ImageColor.getrgb(step) for step in _STEPS.split()], np.float64)


def colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """The ramp's colours of values in [0, 1], clipped: uint8 [..., 3]."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), channel).round().astype(np.uint8) for channel in _RAMP.T]
    return np.stack(channels, -1)


def heat_panel(image: Image.Image, scores: npt.NDArray[np.float32], score_range: tuple[float, float]) -> Image.Image:
    """An RGB image in grey under its scores [height, width]; score_range: those at the ends of the ramp."""
    low, high = score_range
    share = (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)
    return Image.blend(_grey(image), _over(image, colours(share)), _HEAT_SHARE)


def kept_panel(image: Image.Image, kept: npt.NDArray[np.bool_]) -> Image.Image:
    """An RGB image with its dropped tokens grey and pale; around the kept ones goes a line where cells are large.

    kept: bool [height, width].
    """
    mask = _over(image, kept.astype(np.uint8) * 255)
    dimmed = Image.blend(_grey(image), Image.new("RGB", image.size, _DIM), _DIM_SHARE)
    panel = Image.composite(image, dimmed, mask)
    cell = min(image.height / kept.shape[0], image.width / kept.shape[1])
    line = 2 if cell >= 12 else 1 if cell >= 6 else 0
    if line:
        inside = mask.filter(ImageFilter.MinFilter(2 * line + 1))
        panel.paste(_OUTLINE, mask=ImageChops.subtract(mask, inside))
    return panel


def _over(image: Image.Image, cells: npt.NDArray[np.uint8]) -> Image.Image:
    """Cells [height, width, ...] of the token grid, as large as the image."""
    return Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")
