"""Values of config.json, each of the kind that is wanted, or an error that names its key."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from hawk_trt.errors import CheckpointError

# Beyond these no model is, and a size that a checkpoint makes up would fill the memory before a tensor is missed.
_MOST_LAYERS = 1000
_MOST = 2**40
# A number is used as float32.
_LARGEST = 1e30


def integer(section: Mapping[str, Any], key: str, where: str = "") -> int:
    """The integer of at least 1 under a key, and of a size that models have; where is the section's name, with its dot.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = section.get(key)
    most = _MOST_LAYERS if key in ("num_hidden_layers", "depth") else _MOST
    if not is_integer(value) or not 1 <= value <= most:
        raise wrong(where + key, value, f"an integer of 1 to {most}")
    return value


def number(section: Mapping[str, Any], key: str, where: str = "") -> float:
    """The number above 0 under a key; where is the section's name, with its dot.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise wrong(where + key, value, f"a number above 0 and below {_LARGEST:g}")
    return float(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def expect(key: str, got: object, expected: object) -> None:
    """Refuse every value but one.

    Raises:
        CheckpointError: got is not what is expected.
    """
    if got != expected:
        raise wrong(key, got, str(expected))


def wrong(key: str, got: object, expected: str) -> CheckpointError:
    """The error of a setting that is missing or cannot be used."""
    shown = "nothing" if got is None else repr(got)
    return CheckpointError(f"config.json: {key}: got {shown}, expected {expected}")
