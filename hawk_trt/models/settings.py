"""Values of config.json, each of the kind that is wanted, or an error that names its key."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from hawk_trt.errors import CheckpointError


def integer(section: Mapping[str, Any], key: str, where: str = "") -> int:
    """The integer of at least 1 under a key; where is the section's name, with its dot.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = section.get(key)
    if not is_integer(value) or value < 1:
        raise wrong(where + key, value, "an integer of at least 1")
    return value


def number(section: Mapping[str, Any], key: str, where: str = "") -> float:
    """The number above 0 under a key; where is the section's name, with its dot.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise wrong(where + key, value, "a number above 0")
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
