"""From 8-bit colours to what vision towers take: rescaled, then normalised a channel.

Eight bits have 256 values, so both steps are one table a channel, computed once.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.models.family import ImageSettings

Channels = tuple[float, float, float]

BICUBIC = 3
# Normalised values are float32: what lies beyond these is no setting of pixels.
_MOST = 1e6
_LEAST_STD = 1e-6


def object_of(preprocessor: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object under a key, empty where there is none.

    Raises:
        CheckpointError: something else is there.
    """
    value = preprocessor.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(key, value, "a JSON object")
    return value or {}


def whole_number(name: str, value: object, default: int, expected: str) -> int:
    """An integer of at least 1, which JSON may also write as 50176.0; the default for null.

    Raises:
        CheckpointError: something else.
    """
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value < _MOST**2
        or value != int(value)
    ):
        raise wrong(name, value, expected)
    return int(value)


def image_settings(
    preprocessor: Mapping[str, Any], pixels: tuple[int, int], mean: Channels, std: Channels
) -> ImageSettings:
    """Settings from preprocessor_config.json; a key whose value is null counts as not there.

    Args:
        preprocessor: its content.
        pixels: the least and the most of an image after resizing, which every family says in its own way.
        mean: where the file does not say.
        std: where the file does not say.

    Raises:
        CheckpointError: a setting that is not usable.
    """
    if preprocessor.get("do_resize") is False:
        raise wrong("do_resize", False, "true (images are cut into whole patches)")
    if pixels[0] > pixels[1]:
        raise wrong("min_pixels", pixels[0], f"at most max_pixels {pixels[1]}")
    given = {key: value for key, value in preprocessor.items() if value is not None}
    resample = given.get("resample", BICUBIC)
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in range(6):
        raise wrong("resample", resample, "one of Pillow's filters, 0 to 5")
    factor = given.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < _MOST:
        raise wrong("rescale_factor", factor, "a number above 0")
    if preprocessor.get("do_normalize") is False:
        given |= {"image_mean": 0.0, "image_std": 1.0}
    rescaled = preprocessor.get("do_rescale") is not False
    return ImageSettings(
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        mean=_channel_values("image_mean", given.get("image_mean", mean)),
        std=_channel_values("image_std", given.get("image_std", std)),
        rescale_factor=float(factor) if rescaled else 1.0,
        resample=resample,
    )


def value_tables(settings: ImageSettings) -> npt.NDArray[np.float32]:
    """The normalised value of each 8-bit value: float32 [3, 256].

    Rounded where the checkpoint's processor rounds: the rescaled value to float32, then mean and std in float32.
    """
    rescaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean = np.array(settings.mean, dtype=np.float32)[:, None]
    std = np.array(settings.std, dtype=np.float32)[:, None]
    table: npt.NDArray[np.float32] = (rescaled - mean) / std
    return table


def wrong(key: str, got: object, expected: str) -> CheckpointError:
    """The error of a setting that cannot be used."""
    return CheckpointError(f"preprocessor_config.json: {key}: got {repr(got)[:200]}, expected {expected}")


def check_rgb(image: npt.NDArray[np.uint8]) -> None:
    """Refuse what is no RGB image.

    Raises:
        InvalidInput: it is not uint8 [height, width, 3], or empty.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(f"image: got {image.dtype}{list(image.shape)}, expected uint8[height, width, 3]")


def _channel_values(name: str, value: object) -> Channels:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < _MOST for v in values)
    if len(values) != 3 or not numbers:
        raise wrong(name, value, "three numbers, one a channel")
    if name == "image_std" and min(values) < _LEAST_STD:
        raise wrong(name, value, "numbers above 0")
    return float(values[0]), float(values[1]), float(values[2])
