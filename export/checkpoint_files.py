"""The small files of a checkpoint folder: configs, tokenizer, chat template, preprocessors.

In: a folder. Out: what prompts need, each setting once and under one name, as a bundle holds it. Where two
files say the same thing, the file counts that counts for the AutoProcessor of transformers 5.23:

chat template       processor_config.json, chat_template.json, chat_template.jinja, tokenizer_config.json
images              image_processor of processor_config.json, preprocessor_config.json
videos              video_processor of processor_config.json, video_preprocessor_config.json
special tokens      special_tokens_map.json (unless the next has added_tokens_decoder), tokenizer_config.json
stop tokens         all of generation_config.json, config.json and the tokenizer end an answer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hawk_trt.errors import CheckpointError
from hawk_trt.files import read_bytes
from hawk_trt.files import read_json as read_json_of
from hawk_trt.inputs.tokenizer import spelling

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENS_MAP = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_PROCESSOR = "processor_config.json"
_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
SMALL_FILES = (
    *(CONFIG, GENERATION_CONFIG, TOKENIZER, _TOKENIZER_CONFIG, _TOKENS_MAP, _TEMPLATE, _OLD_TEMPLATE),
    *(_PREPROCESSOR, _VIDEO_PREPROCESSOR, _PROCESSOR),
)
_KEYS_OF_PROCESSOR = {_PREPROCESSOR: "image_processor", _VIDEO_PREPROCESSOR: "video_processor"}


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """Contents by their names in a bundle, each setting once; and which file counted where two differ."""

    contents: dict[str, bytes]
    notes: tuple[str, ...]


def read_small_files(folder: Path, template: str | None = None) -> SmallFiles:
    """The small files of a checkpoint. None but config.json must be there; a damaged one is a CheckpointError.

    template: the chat template of a family whose checkpoints hold none that knows images; it counts before that of
    tokenizer_config.json.
    """
    notes: list[str] = []
    added_tokens(folder)  # a damaged tokenizer is refused here
    contents = {name: read_bytes(folder / name, CheckpointError) for name in SMALL_FILES if (folder / name).is_file()}
    whole, old = (json_object(folder, name) for name in (_PROCESSOR, _OLD_TEMPLATE))
    tokenizer = json_object(folder, _TOKENIZER_CONFIG)
    if TOKENIZER in contents:
        jinja = contents.get(_TEMPLATE)
        chosen = _first(
            "chat template",
            {
                _PROCESSOR: _template(folder / _PROCESSOR, whole.get("chat_template")),
                _OLD_TEMPLATE: _template(folder / _OLD_TEMPLATE, old.get("chat_template")),
                _TEMPLATE: None if jinja is None else as_text(folder / _TEMPLATE, jinja),
                "the family": template,
                _TOKENIZER_CONFIG: _template(folder / _TOKENIZER_CONFIG, tokenizer.get("chat_template")),
            },
            notes,
        )
        if chosen is not None:
            contents[_TEMPLATE] = chosen.encode()
        if over := _special_tokens_over(folder, tokenizer):
            contents[_TOKENIZER_CONFIG] = msgspec.json.encode(tokenizer | over)
            both = {name for name in over.keys() & tokenizer.keys() if name.endswith("_token")}
            spelt = {_TOKENS_MAP: over, _TOKENIZER_CONFIG: tokenizer}
            _first("special tokens", {file: {n: spelling(of[n]) for n in both} for file, of in spelt.items()}, notes)
    for name, key in _KEYS_OF_PROCESSOR.items():
        nested = whole.get(key)
        if nested is not None and not isinstance(nested, dict):
            raise CheckpointError(f"{folder / _PROCESSOR}: {key}: got {type(nested).__name__}, expected a JSON object")
        own = json_object(folder, name) if name in contents else None
        settings = _first(key.replace("_", " "), {_PROCESSOR: nested, name: own}, notes)
        if settings is not None:
            contents[name] = msgspec.json.format(msgspec.json.encode(settings), indent=2)
    for name in (_PROCESSOR, _OLD_TEMPLATE, _TOKENS_MAP):
        contents.pop(name, None)
    return SmallFiles(contents, tuple(notes))


def stop_tokens(folder: Path, found: Sequence[int], added: Mapping[str, int]) -> tuple[int, ...]:
    """All tokens that end an answer: those found in generation_config.json and config.json, and the tokenizer's.

    The tokenizer's is the eos_token of tokenizer_config.json and special_tokens_map.json, where it is an added token.
    """
    config = json_object(folder, _TOKENIZER_CONFIG)
    named = [spelling(source.get("eos_token")) for source in (config, _special_tokens_over(folder, config))]
    own = [added[content] for content in named if content is not None and content in added]
    return tuple(dict.fromkeys([*found, *own]))


def _special_tokens_over(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """What special_tokens_map.json, of older tokenizers, says over tokenizer_config.json."""
    return {} if "added_tokens_decoder" in tokenizer_config else json_object(folder, _TOKENS_MAP)


def added_tokens(folder: Path) -> dict[str, int]:
    """Content to id of the tokenizer's added tokens; empty without a tokenizer."""
    path = folder / TOKENIZER
    if not path.is_file():
        return {}
    tokens = read_json(path).get("added_tokens") or ()
    try:
        return {token.content: token.id for token in msgspec.convert(tokens, list[_AddedToken])}
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: its added_tokens are damaged ({error}), expected content and id") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; CheckpointError where it cannot be read or holds something else."""
    return read_json_of(path, dict[str, Any], CheckpointError, "Download it again, or mend it")


class _AddedToken(msgspec.Struct):
    content: str
    id: int


def _first(what: str, candidates: Mapping[str, Any], notes: list[str]) -> Any:  # noqa: ANN401 - a text or an object
    """The first that is there, with a note where a later file says something else."""
    there = {name: value for name, value in candidates.items() if value is not None}
    if not there:
        return None
    name, chosen = next(iter(there.items()))
    if others := [other for other, value in there.items() if value != chosen and other != "the family"]:
        notes.append(f"{what}: {name} counts, as in transformers; {', '.join(others)} differs and is left out")
    return chosen


def _template(path: Path, found: object) -> str | None:
    """A chat template from the key of a JSON file: the one named "default" where there are several."""
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, Mapping)}
    if isinstance(found, Mapping):
        found = found.get("default") or (next(iter(found.values())) if len(found) == 1 else found)
    if found is None or isinstance(found, str):
        return found
    raise CheckpointError(
        f"{path}: chat_template: got {type(found).__name__}, expected a string or a list with one named default. "
        f"Put the template to use into {_TEMPLATE} in the checkpoint folder, and delete this key"
    )


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder, empty where there is no such file."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def as_text(path: Path, content: bytes) -> str:
    """UTF-8 as text; CheckpointError where it is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error})") from error
