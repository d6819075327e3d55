"""A prompt as the chat template renders it: turns, whose content is a string, or texts and visual items in order.

A string is one turn of the user; messages.py reads chat messages.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.files import MAX_JSON_DEPTH

VisualKind: TypeAlias = Literal["image", "video"]
JsonObject: TypeAlias = Mapping[str, Any]
Sources: TypeAlias = Mapping[VisualKind, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class VisualItem:
    """An image or video of a prompt, not yet opened; None takes the checkpoint's or the family's rule."""

    kind: VisualKind
    # what the caller gave, an ImageInput or a VideoInput by kind
    source: Any  # kind decides which of the two it is, which no annotation can say
    min_pixels: int | None = None
    max_pixels: int | None = None  # enlarge or shrink to this area (of a frame)
    resized_height: int | None = None
    resized_width: int | None = None  # what to resize to, before it is rounded to whole tokens; both or none
    total_pixels: int | None = None  # shrink the frames of a video until all together have this area
    # frames a second to sample from a video file, or at which given frames were taken; None is 2
    fps: float | None = None
    num_frames: int | None = None  # sampled from a file, in place of fps
    min_frames: int | None = None  # sampled from a file at least, where it has so many
    max_frames: int | None = None  # sampled from a file at most; None is 768
    start: float | None = None
    end: float | None = None  # seconds of a file from which on, and up to which, frames are sampled
    # where a file's frame rate varies, take the times of its frames from the file; else a frame's time is its number
    # divided by the average rate, as in transformers
    timestamps: bool = True

    @property
    def resized(self) -> tuple[int, int] | None:
        """Height and width to resize to."""
        height, width = self.resized_height, self.resized_width
        return None if height is None or width is None else (height, width)


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat message; `more` holds the name, tool_calls, tool_call_id or reasoning_content that it has."""

    role: str
    content: str | tuple[str | VisualItem, ...]
    more: JsonObject = field(default_factory=dict)

    def texts(self) -> tuple[str, ...]:
        """Texts of the content, in order, and all other strings."""
        parts = (self.content,) if isinstance(self.content, str) else self.content
        return (*(part for part in parts if isinstance(part, str)), *strings(self.more))

    def visual(self) -> tuple[VisualItem, ...]:
        """Images and videos, in order."""
        parts = () if isinstance(self.content, str) else self.content  # a string would be looked at letter by letter
        return tuple(part for part in parts if isinstance(part, VisualItem))


def user_turn(prompt: str, sources: Sources) -> Turn:
    """The turn of a string: all images, then all videos, come before it."""
    items = [VisualItem(kind, source) for kind, listed in sources.items() for source in listed]
    return Turn("user", (*items, valid_text(prompt, "prompt")))


def as_list(values: Any, kind: VisualKind) -> Sequence[Any]:  # noqa: ANN401 - an image or video, or several
    """Several images or videos, a single one, or None, as a list."""
    if values is None:
        return ()
    if isinstance(values, np.ndarray):
        several = 4 if kind == "image" else 5
        return list(values) if values.ndim == several else [values]
    single = isinstance(values, str | bytes | bytearray | memoryview) or not isinstance(values, Sequence)
    return [values] if single else values


def checked_objects(values: object, where: str) -> tuple[JsonObject, ...]:
    """A list of JSON objects, for tools or tool_calls; InvalidInput where it is something else."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidInput(f"{where}: got {type(values).__name__}, expected a list of JSON objects")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{where}[{index}]: got {type(value).__name__}, expected a JSON object")
        for place, leaf in _leaves(value, f"{where}[{index}]"):
            if isinstance(leaf, str):
                valid_text(leaf, place)
            elif not (leaf is None or isinstance(leaf, bool | int | float)):
                raise InvalidInput(f"{place}: got {type(leaf).__name__}, expected a JSON value")
    return tuple(values)


def strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, keys too."""
    return (leaf for _, leaf in _leaves(value, "") if isinstance(leaf, str))


def _leaves(value: object, where: str, depth: int = 0) -> Iterator[tuple[str, object]]:
    """The keys in a JSON value, and what holds no other values, each with its place."""
    if depth > MAX_JSON_DEPTH:
        raise InvalidInput(f"{where[:100]}: nested deeper than {MAX_JSON_DEPTH} levels, expected a JSON value")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{where}: got a key {key!r}, expected strings as keys")
            yield where, key
            yield from _leaves(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{index}]", depth + 1)
    else:
        yield where, value


def with_strings(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - a JSON value in, one like it out
    """The same JSON value with each string changed; identifiers as keys stay: templates read them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key.isidentifier() else change(key): with_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [with_strings(inner, change) for inner in value]
    return value


def valid_text(value: object, where: str) -> str:
    """A string that UTF-8 can hold; InvalidInput where a value is something else."""
    if not isinstance(value, str):
        raise InvalidInput(f"{where}: got {shape_of(value)} as text, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{where}: character {error.start} is half of a surrogate pair or no UTF-8, expected valid text"
        ) from error
    return value


def shape_of(value: object) -> str:
    """What a value is, without its content, which may be large."""
    return f"a mapping of {listed(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def listed(names: Iterable[str]) -> str:
    """Names for an error."""
    return ", ".join(names) or "nothing"
