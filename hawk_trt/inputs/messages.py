"""Prompts as users write them, checked and brought to one shape: a string or chat messages in, turns out.

A turn's content is a string, or texts and visual items in the order in which the model reads them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.tools import JsonObject, checked_objects, strings, with_strings

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput, Message, VideoInput

VisualKind: TypeAlias = Literal["image", "video"]

_ROLES = ("system", "user", "assistant", "tool")
# Of a message beside role and content. An answer that only calls tools has no content.
_MORE_KEYS = {"assistant": {"tool_calls"}, "tool": {"name", "tool_call_id"}}
_KEYS = {"text": ("type", "text"), "image": ("type", "image"), "video": ("type", "video", "fps", "max_frames")}


@dataclass(frozen=True, slots=True)
class VisualItem:
    """An image or video of a prompt.

    Attributes:
        kind: "image" or "video".
        source: what the caller gave, an ImageInput or a VideoInput by kind, not yet opened.
        fps: frames a second to sample from a video, None for the default.
        max_frames: the most to sample from it, None for the default.
    """

    kind: VisualKind
    source: Any  # kind decides which of the two it is, which no annotation can say
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat message.

    Attributes:
        role: of who says it.
        content: a string, or texts and visual items.
        more: tool_calls of the assistant, name and tool_call_id of a tool.
    """

    role: str
    content: str | tuple[str | VisualItem, ...]
    more: JsonObject = field(default_factory=dict)

    def texts(self) -> tuple[str, ...]:
        """Its texts, in order, and what strings else it has."""
        parts = (self.content,) if isinstance(self.content, str) else self.content
        return (*(part for part in parts if isinstance(part, str)), *strings(self.more))

    def visual(self) -> tuple[VisualItem, ...]:
        """Its images and videos, in order."""
        return tuple(part for part in self.content if isinstance(part, VisualItem))

    def with_texts(self, change: Callable[[str], str]) -> "Turn":
        """The same with each text changed."""
        more = with_strings(self.more, change)
        if isinstance(self.content, str):
            return replace(self, content=change(self.content), more=more)
        parts = tuple(change(part) if isinstance(part, str) else part for part in self.content)
        return replace(self, content=parts, more=more)


def read_prompt(
    prompt: "str | Sequence[Message]", images: "Sequence[ImageInput]" = (), videos: "Sequence[VideoInput]" = ()
) -> tuple[Turn, ...]:
    """Check a prompt and bring it to turns.

    Args:
        prompt: a string, one user turn with all images, then all videos, before it; or chat messages, each a
            mapping with "role" and "content", the content a string or a list of items: {"type": "text", "text": ...},
            {"type": "image", "image": ...}, {"type": "video", "video": ..., "fps": ..., "max_frames": ...}. An
            assistant's may have tool_calls, a tool's name and tool_call_id, as the template knows them.
        images: sources of a string's images, or of the image items without one, in order.
        videos: the same for videos.

    Raises:
        InvalidInput: a shape, role, content type or key that is not known, no message, no turn to answer, or
            images and videos that do not fit the items without a source.
    """
    _check_list("images", images)
    _check_list("videos", videos)
    if isinstance(prompt, str):
        items = [VisualItem("image", image) for image in images] + [VisualItem("video", video) for video in videos]
        return (Turn("user", (*items, _text(prompt, "prompt"))),)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InvalidInput(f"prompt: got {type(prompt).__name__}, expected a string, a list of messages or ModelInputs")
    turns = tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(prompt))
    if not turns:
        raise InvalidInput("messages: got an empty list, expected at least a user message")
    if turns[-1].role == "assistant":
        raise InvalidInput(
            "messages: the last one is the assistant's, expected a turn to answer. "
            "Append a user message, or leave the last message out"
        )
    return _with_sources(turns, images, videos)


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidInput(f"{where}: got {_shape(message)}, expected a mapping of role, content")
    role = message["role"]
    if role not in _ROLES:
        raise InvalidInput(f"{where}: got role {role!r}, expected {_listed(_ROLES)}")
    allowed = ("role", "content", *sorted(_MORE_KEYS.get(role, ())))
    if not set(message) <= set(allowed) or not ("content" in message or message.get("tool_calls")):
        raise InvalidInput(f"{where}: got {_shape(message)}, expected a mapping of {_listed(allowed)}")
    more = _more(message, where)
    content = message.get("content")
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, str):
        return Turn(role, _text(content, where), more)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidInput(f"{where}: got {_shape(content)} as content, expected a string or a list of items")
    return Turn(role, tuple(_item(item, f"{where} item {index}") for index, item in enumerate(content)), more)


def _more(message: Mapping[str, Any], where: str) -> JsonObject:
    """What a message has beside role and content."""
    more: dict[str, Any] = {key: _text(message[key], f"{where} {key}") for key in _MORE_KEYS["tool"] & set(message)}
    if message.get("tool_calls"):
        more["tool_calls"] = checked_objects(message["tool_calls"], f"{where} tool_calls")
    return more


def _item(item: object, where: str) -> str | VisualItem:
    if not isinstance(item, Mapping):
        raise InvalidInput(f"{where}: got {_shape(item)}, expected a mapping with a type: {_listed(_KEYS)}")
    # Many prompts leave the type out; the key then says it.
    kind = item.get("type", next((key for key in _KEYS if key in item), None))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise InvalidInput(f"{where}: got type {kind!r}, expected {_listed(_KEYS)}")
    if not set(item) <= set(_KEYS[kind]):
        raise InvalidInput(f"{where}: got {_shape(item)}, expected no keys but {_listed(_KEYS[kind])}")
    if kind == "text":
        return _text(item.get("text"), where)
    return VisualItem(
        "image" if kind == "image" else "video",
        item.get(kind),
        _fps(item.get("fps"), where),
        _max_frames(item.get("max_frames"), where),
    )


def _with_sources(
    turns: tuple[Turn, ...], images: "Sequence[ImageInput]", videos: "Sequence[VideoInput]"
) -> tuple[Turn, ...]:
    """Give images and videos to the items without a source."""
    missing = Counter(item.kind for turn in turns for item in turn.visual() if item.source is None)
    sources: dict[VisualKind, Iterator[ImageInput | VideoInput]] = {"image": iter(images), "video": iter(videos)}
    given: dict[VisualKind, int] = {"image": len(images), "video": len(videos)}
    for kind, count in given.items():
        if missing[kind] != count:
            raise InvalidInput(
                f"{kind}s: got {count}, but the messages have {missing[kind]} {kind} items without a source; "
                f'expected one for each {{"type": "{kind}"}}'
            )

    def filled(part: str | VisualItem) -> str | VisualItem:
        if isinstance(part, str) or part.source is not None:
            return part
        return replace(part, source=next(sources[part.kind]))

    return tuple(
        turn if isinstance(turn.content, str) else replace(turn, content=tuple(filled(part) for part in turn.content))
        for turn in turns
    )


def _check_list(name: str, values: object) -> None:
    # A single path or array is a sequence too, of characters or rows: taking it apart would be a riddle.
    if isinstance(values, str | bytes | PathLike) or not isinstance(values, Sequence):
        raise InvalidInput(f"{name}: got a single {type(values).__name__}, expected a list: {name}=[...]")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{where}: got {_shape(value)} as text, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{where}: character {error.start} is half of a surrogate pair, expected valid text"
        ) from error
    return value


def _fps(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise InvalidInput(f"{where}: got fps {value!r}, expected a number above 0, frames a second")
    return float(value)


def _max_frames(value: object, where: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise InvalidInput(f"{where}: got max_frames {value!r}, expected an integer above 0")


def _shape(value: object) -> str:
    """What a value is, without its content, which may be large."""
    return f"a mapping of {_listed(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
