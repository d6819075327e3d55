"""Prompts as users write them, checked and brought to one shape: a string or chat messages in, turns out.

A turn's content is a string, or texts and visual items in the order in which the model reads them. The shapes of
transformers, of qwen-vl-utils and of OpenAI are read; what cannot be honoured is refused by its name.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import base64_bytes

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput, Message, VideoInput

VisualKind: TypeAlias = Literal["image", "video"]
JsonObject: TypeAlias = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
# Of a message beside role, content and name. An answer that only calls tools has no content.
_MORE_KEYS = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}
_KINDS: dict[str, Literal["text", "image", "video"]] = {
    **{"text": "text", "image": "image", "video": "video"},
    **{"input_text": "text", "image_url": "image", "input_image": "image", "video_url": "video"},
}
_SOURCES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path")}
# The settings of an item, and what a VisualItem calls them.
_SIZES = {name: name for name in ("min_pixels", "max_pixels", "resized_height", "resized_width")}
_SETTINGS = {
    "image": _SIZES,
    "video": _SIZES
    | {"total_pixels": "total_pixels", "timestamps": "timestamps", "fps": "fps", "sample_fps": "fps"}
    | {"nframes": "num_frames", "num_frames": "num_frames", "min_frames": "min_frames", "max_frames": "max_frames"}
    | {"video_start": "start", "video_end": "end"},
}
_KEYS = {
    "text": ("text",),
    "image": (*_SOURCES["image"], *_SETTINGS["image"], "detail"),
    "video": (*_SOURCES["video"], *_SETTINGS["video"]),
}
_MOST = 1e15
# OpenAI's names of what is done here anyway: the image is taken as it is, within the checkpoint's bounds.
_FULL_DETAIL = ("auto", "high", "original")


@dataclass(frozen=True, slots=True)
class VisualItem:
    """An image or video of a prompt, not yet opened; None takes the checkpoint's or the family's rule.

    Attributes:
        source: what the caller gave, an ImageInput or a VideoInput by kind.
        min_pixels, max_pixels: enlarge or shrink to this area (of a frame).
        resized_height, resized_width: what to resize to, before it is rounded to whole tokens; both or none.
        total_pixels: shrink the frames of a video until all together have this area.
        fps: frames a second to sample from a video file, or at which given frames were taken; None is 2.
        num_frames: sampled from a file, in place of fps.
        min_frames: sampled from a file at least, where it has so many.
        max_frames: sampled from a file at most; None is 768.
        start, end: seconds of a file from which on, and up to which, frames are sampled.
        timestamps: where a file's frame rate varies, take the times of its frames from the file; else a frame's time
            is its number divided by the average rate, as in transformers.
    """

    kind: VisualKind
    source: Any  # kind decides which of the two it is, which no annotation can say
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    total_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
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


def read_prompt(
    prompt: "str | Sequence[Message]",
    images: "ImageInput | Sequence[ImageInput]" = (),
    videos: "VideoInput | Sequence[VideoInput]" = (),
) -> tuple[Turn, ...]:
    """Check a prompt and bring it to turns.

    Args:
        prompt: a string, one user turn with all images, then all videos, before it; or chat messages, as
            docs/prompts.md says. A key whose value is None counts as not there.
        images: sources of a string's images, or of the image items without one, in order; one alone needs no list.
        videos: the same for videos.

    Raises:
        InvalidInput: a shape, role, content type or key that is not known, no message, no turn to answer, or
            images and videos that do not fit the items without a source.
    """
    sources: dict[VisualKind, Sequence[Any]] = {"image": as_list(images, "image"), "video": as_list(videos, "video")}
    if isinstance(prompt, str):
        items = [VisualItem(kind, source) for kind, listed in sources.items() for source in listed]
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
    return _with_sources(turns, sources)


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
        _check_json(value, f"{where}[{index}]")
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


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidInput(f"{where}: got {_shape(message)}, expected a mapping of role, content")
    role = "system" if message["role"] == "developer" else message["role"]  # OpenAI's newer name
    if role not in _ROLES:
        raise InvalidInput(f"{where}: got role {role!r}, expected {_listed(_ROLES)}")
    given = {key: value for key, value in message.items() if value is not None}
    allowed = ("role", "content", "name", *_MORE_KEYS.get(role, ()))
    if not set(given) <= set(allowed) or not ("content" in message or given.get("tool_calls")):
        raise InvalidInput(f"{where}: got {_shape(given)}, expected a mapping of {_listed(allowed)}")
    texts = [key for key in ("name", "reasoning_content", "tool_call_id") if key in given]
    more: dict[str, Any] = {key: _text(given[key], f"{where} {key}") for key in texts}
    if given.get("tool_calls"):
        more["tool_calls"] = checked_objects(given["tool_calls"], f"{where} tool_calls")
    content = given.get("content", "")
    if isinstance(content, str):
        return Turn(role, _text(content, where), more)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidInput(f"{where}: got {_shape(content)} as content, expected a string or a list of items")
    return Turn(role, tuple(_item(item, f"{where} item {index}") for index, item in enumerate(content)), more)


def _item(item: object, where: str) -> str | VisualItem:
    if not isinstance(item, Mapping):
        raise InvalidInput(f"{where}: got {_shape(item)}, expected a mapping with a type: {_listed(_KINDS)}")
    given = {key: value for key, value in item.items() if value is not None}
    # Many prompts leave the type out; the key then says it.
    kind_name = given.get("type", next((key for key in _KINDS if key in given), None))
    kind = _KINDS.get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        raise InvalidInput(f"{where}: got type {kind_name!r}, expected {_listed(_KINDS)}")
    if not set(given) <= {"type", *_KEYS[kind]}:
        unknown = _listed(sorted(map(str, set(given) - {"type", *_KEYS[kind]})))
        raise InvalidInput(f"{where}: got {unknown}, expected no keys but type, {_listed(_KEYS[kind])}")
    if kind == "text":
        return _text(given.get("text"), where)
    settings: dict[str, Any] = {}
    for key in _SETTINGS[kind].keys() & given.keys():
        name = _SETTINGS[kind][key]
        if name in settings:
            raise InvalidInput(f"{where}: got {_shape(given)}, expected one name for each setting")
        settings[name] = _setting(given[key], key, where)
    if ("resized_height" in settings) != ("resized_width" in settings):
        raise InvalidInput(f"{where}: got {_shape(given)}, expected resized_height and resized_width, or neither")
    return VisualItem(kind, _source(given, kind, where), **settings)


def _setting(value: Any, key: str, where: str) -> bool | int | float:  # noqa: ANN401 - what JSON or numpy has
    """The value of a setting of an item: a switch, a rate, seconds, or else a whole number."""
    is_switch = isinstance(value, bool)
    number = isinstance(value, int | float | np.number) and not is_switch and 0 <= value < _MOST
    if key == "timestamps":
        expected = "true or false"
        if is_switch:
            return bool(value)
    elif key in ("fps", "sample_fps", "video_start", "video_end"):
        expected = f"a number {'at least' if key == 'video_start' else 'above'} 0"
        if number and (value or key == "video_start"):
            return float(value)
    else:
        expected = "an integer above 0"
        if number and value and isinstance(value, int | np.integer):
            return int(value)
    raise InvalidInput(f"{where}: got {key} {value!r}, expected {expected}")


def _source(given: Mapping[str, Any], kind: VisualKind, where: str) -> object:
    """The image or video of an item, None where another argument brings it."""
    names = [name for name in _SOURCES[kind] if name in given]
    if len(names) > 1:
        raise InvalidInput(f"{where}: got {_listed(names)}, expected one of them")
    source = given[names[0]] if names else None
    detail = given.get("detail")
    if names and names[0].endswith("_url") and isinstance(source, Mapping):
        if not {"url"} <= set(source) <= {"url", "detail"}:
            raise InvalidInput(f"{where}: got {_shape(source)} as {names[0]}, expected a mapping of url")
        source, detail = source["url"], source.get("detail", detail)
    if detail is not None and detail not in _FULL_DETAIL:
        raise InvalidInput(
            f"{where}: got detail {detail!r}, expected {_listed(_FULL_DETAIL)}; max_pixels bounds a size"
        )
    if names == ["base64"]:
        text = _text(source, where)
        return text if text.lstrip()[:5].lower() == "data:" else base64_bytes(text, where)
    return source


def _with_sources(turns: tuple[Turn, ...], sources: Mapping[VisualKind, Sequence[Any]]) -> tuple[Turn, ...]:
    """Give images and videos to the items without a source."""
    missing = Counter(item.kind for turn in turns for item in turn.visual() if item.source is None)
    for kind, given in sources.items():
        if missing[kind] != len(given):
            raise InvalidInput(
                f"{kind}s: got {len(given)}, but the messages have {missing[kind]} {kind} items without a source; "
                f'expected one for each {{"type": "{kind}"}}'
            )
    waiting = {kind: iter(given) for kind, given in sources.items()}

    def filled(part: str | VisualItem) -> str | VisualItem:
        if isinstance(part, str) or part.source is not None:
            return part
        return replace(part, source=next(waiting[part.kind]))

    return tuple(
        turn if isinstance(turn.content, str) else replace(turn, content=tuple(filled(part) for part in turn.content))
        for turn in turns
    )


def _check_json(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{where}: got a key {key!r}, expected strings as keys")
            _check_json(key, where)
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, str):
        _text(value, where)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise InvalidInput(f"{where}: got {type(value).__name__}, expected a JSON value")


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


def _shape(value: object) -> str:
    """What a value is, without its content, which may be large."""
    return f"a mapping of {_listed(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
