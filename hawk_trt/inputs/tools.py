"""Tools: the functions that a chat template tells the model of, and the model's calls of them, as plain JSON values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from hawk_trt.errors import InvalidInput

JsonObject: TypeAlias = Mapping[str, Any]


def checked_objects(values: object, where: str) -> tuple[JsonObject, ...]:
    """A list of JSON objects, for tools or tool_calls.

    Raises:
        InvalidInput: something else, or a value that JSON does not have.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidInput(f"{where}: got {type(values).__name__}, expected a list of JSON objects")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{where}[{index}]: got {type(value).__name__}, expected a JSON object")
        _check(value, f"{where}[{index}]")
    return tuple(values)


def strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings(inner)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - a JSON value in, one like it out
    """The same JSON value with each string changed; identifiers as keys stay: templates read them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key.isidentifier() else change(key): with_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [with_strings(inner, change) for inner in value]
    return value


def _check(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{where}: got a key {key!r}, expected strings as keys")
            _check(key, where)
            _check(inner, f"{where}.{key}")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"{where}: half of a surrogate pair, expected valid text") from error
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise InvalidInput(f"{where}: got {type(value).__name__}, expected a JSON value")
