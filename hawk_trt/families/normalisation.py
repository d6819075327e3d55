"""From 8-bit colours to what vision towers take: rescaled, then normalised a channel.

Eight bits have 256 values, so both steps are one table a channel, computed once.
"""

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import CheckpointError
from hawk_trt.families import ImageSettings


def value_tables(settings: ImageSettings) -> npt.NDArray[np.float32]:
    """The normalised value of each 8-bit value: float32 [3, 256].

    Rounded where the checkpoint's processor rounds: the rescaled value to float32, then mean and std in float32.
    """
    rescaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean = np.array(settings.mean, dtype=np.float32)[:, None]
    std = np.array(settings.std, dtype=np.float32)[:, None]
    table: npt.NDArray[np.float32] = (rescaled - mean) / std
    return table


def channel_values(name: str, value: object) -> tuple[float, float, float]:
    """image_mean or image_std of preprocessor_config.json: a number for each channel, or one for all.

    Raises:
        CheckpointError: something else, or a std of 0.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise wrong(name, value, "three numbers, one a channel")
    if name == "image_std" and 0 in values:
        raise wrong(name, value, "numbers above 0")
    return float(values[0]), float(values[1]), float(values[2])


def wrong(key: str, got: object, expected: str) -> CheckpointError:
    """The error of a setting that cannot be used."""
    return CheckpointError(f"preprocessor_config.json: {key}: got {got!r}, expected {expected}")
