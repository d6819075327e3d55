"""Chat messages as users write them, checked and brought to turns.

The shapes of transformers, of qwen-vl-utils and of OpenAI are read; what cannot be honoured is refused by its name.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import base64_bytes
from hawk_trt.inputs.turns import (
    Sources,
    Turn,
    VisualItem,
    VisualKind,
    checked_objects,
    listed,
    shape_of,
    valid_text,
)

if TYPE_CHECKING:
    from hawk_trt.request import Message

_ROLES = ("system", "user", "assistant", "tool")
# Of a message beside role, content and name. An answer that only calls tools has no content.
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first of them counts, as in transformers
_MORE_KEYS = {"assistant": (*_REASONING, "tool_calls"), "tool": ("tool_call_id",)}
_KINDS: dict[str, Literal["text", "image", "video"]] = {
    **{"text": "text", "image": "image", "video": "video"},
    **{"input_text": "text", "output_text": "text", "image_url": "image", "input_image": "image", "video_url": "video"},
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


def read_messages(messages: "Sequence[Message]", sources: Sources) -> tuple[Turn, ...]:
    """Check chat messages (docs/prompts.md) and bring them to turns. A key of None or [] counts as not there.

    sources: of the image and video items without one, in order. Raises InvalidInput: a shape, role, content type or key
    that is not known, no message, no turn to answer, or images and videos that do not fit the items without a source.
    """
    if isinstance(messages, bytes) or not isinstance(messages, Sequence):
        got = type(messages).__name__
        raise InvalidInput(f"prompt: got {got}, expected a string, a list of messages or ModelInputs")
    turns = tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(messages))
    if not turns:
        raise InvalidInput("messages: got an empty list, expected at least a user message")
    if turns[-1].role == "assistant":
        raise InvalidInput(
            "messages: the last one is the assistant's, expected a turn to answer. "
            "Append a user message, or leave the last message out"
        )
    return _with_sources(turns, sources)


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidInput(f"{where}: got {shape_of(message)}, expected a mapping of role, content")
    role = "system" if message["role"] == "developer" else message["role"]  # OpenAI's newer name
    if role not in _ROLES:
        raise InvalidInput(f"{where}: got role {role!r}, expected {listed(_ROLES)}")
    given = _given(message)
    allowed = ("role", "content", "name", *_MORE_KEYS.get(role, ()))
    if not set(given) <= set(allowed) or not ("content" in message or given.get("tool_calls")):
        raise InvalidInput(f"{where}: got {shape_of(given)}, expected a mapping of {listed(allowed)}")
    texts = [key for key in ("name", *_REASONING, "tool_call_id") if key in given]
    more: dict[str, Any] = {key: valid_text(given[key], f"{where} {key}") for key in texts}
    if thought := [more.pop(key) for key in _REASONING if key in more]:
        more["reasoning_content"] = thought[0]
    if given.get("tool_calls"):
        calls = checked_objects(given["tool_calls"], f"{where} tool_calls")
        more["tool_calls"] = checked_objects([_with_arguments(call) for call in calls], f"{where} tool_calls")
    content = given.get("content", "")
    if isinstance(content, str):
        return Turn(role, valid_text(content, where), more)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidInput(f"{where}: got {shape_of(content)} as content, expected a string or a list of items")
    return Turn(role, tuple(_item(item, f"{where} item {index}") for index, item in enumerate(content)), more)


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something; a video without frames is refused later."""
    empty = {key for key, value in mapping.items() if isinstance(value, list) and not value} - {"video"}
    return {key: value for key, value in mapping.items() if value is not None and key not in empty}


def _with_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call whose arguments, which OpenAI has as JSON text, are the object that templates expect."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _item(item: object, where: str) -> str | VisualItem:
    if not isinstance(item, Mapping):
        raise InvalidInput(f"{where}: got {shape_of(item)}, expected a mapping with a type: {listed(_KINDS)}")
    given = _given(item)
    # Many prompts leave the type out; the key then says it.
    kind_name = given.get("type", next((key for key in _KINDS if key in given), None))
    kind = _KINDS.get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        raise InvalidInput(f"{where}: got type {kind_name!r}, expected {listed(_KINDS)}")
    if not set(given) <= {"type", *_KEYS[kind]}:
        unknown = listed(sorted(map(str, set(given) - {"type", *_KEYS[kind]})))
        raise InvalidInput(f"{where}: got {unknown}, expected no keys but type, {listed(_KEYS[kind])}")
    if kind == "text":
        return valid_text(given.get("text"), where)
    settings: dict[str, Any] = {}
    for key in _SETTINGS[kind].keys() & given.keys():
        name = _SETTINGS[kind][key]
        if name in settings:
            raise InvalidInput(f"{where}: got {shape_of(given)}, expected one name for each setting")
        settings[name] = _setting(given[key], key, where)
    if ("resized_height" in settings) != ("resized_width" in settings):
        raise InvalidInput(f"{where}: got {shape_of(given)}, expected resized_height and resized_width, or neither")
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
        if number and value and value == int(value):  # 50176.0, as a product with a float is
            return int(value)
    raise InvalidInput(f"{where}: got {key} {value!r}, expected {expected}")


def _source(given: Mapping[str, Any], kind: VisualKind, where: str) -> object:
    """The image or video of an item, None where another argument brings it."""
    names = [name for name in _SOURCES[kind] if name in given]
    if len(names) > 1:
        raise InvalidInput(f"{where}: got {listed(names)}, expected one of them")
    source = given[names[0]] if names else None
    detail = given.get("detail")
    if names and names[0].endswith("_url") and isinstance(source, Mapping):
        if not {"url"} <= set(source) <= {"url", "detail"}:
            raise InvalidInput(f"{where}: got {shape_of(source)} as {names[0]}, expected a mapping of url")
        source, detail = source["url"], source.get("detail", detail)
    if detail is not None and detail not in _FULL_DETAIL:
        raise InvalidInput(f"{where}: got detail {detail!r}, expected {listed(_FULL_DETAIL)}; max_pixels bounds a size")
    if names == ["base64"]:
        text = valid_text(source, where)
        return text if text.lstrip()[:5].lower() == "data:" else base64_bytes(text, where)
    return source


def _with_sources(turns: tuple[Turn, ...], sources: Sources) -> tuple[Turn, ...]:
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
