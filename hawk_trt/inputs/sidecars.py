"""The small files of a checkpoint beside its weights: configs, tokenizer, chat template, preprocessor.

In: a checkpoint folder. Out: their contents, as a bundle holds them. None but config.json must be there: without a
tokenizer or a preprocessor config only tensors can be prompts.
"""

import json
from pathlib import Path
from typing import Any

from hawk_trt.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_PREPROCESSOR = "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
# What transformers 5 writes instead of these two, and under which of its keys they are.
_PROCESSOR = "processor_config.json"
_PARTS = {_PREPROCESSOR: "image_processor", _VIDEO_PREPROCESSOR: "video_processor"}
SIDECARS = (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    _TEMPLATE,
    "chat_template.json",
    _PREPROCESSOR,
    _VIDEO_PREPROCESSOR,
    _PROCESSOR,
)


def read_sidecars(checkpoint: Path, template: str | None = None) -> dict[str, bytes]:
    """The contents of what is there of SIDECARS, by name.

    The preprocessors' files are taken from processor_config.json if need be.

    Args:
        checkpoint: its folder.
        template: taken as chat_template.jinja where the checkpoint has no such file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    contents = {name: _read(checkpoint / name) for name in SIDECARS if (checkpoint / name).is_file()}
    whole = read_json(checkpoint / _PROCESSOR) if _PROCESSOR in contents else {}
    for name, key in _PARTS.items():
        if name not in contents and whole.get(key):
            contents[name] = json.dumps(whole[key], indent=2).encode()
    if template is not None and TOKENIZER in contents:
        contents.setdefault(_TEMPLATE, template.encode())
    return contents


def added_tokens(checkpoint: Path) -> dict[str, int]:
    """Content to id of the tokenizer's added tokens; empty without a tokenizer.

    Raises:
        CheckpointError: tokenizer.json is damaged.
    """
    path = checkpoint / TOKENIZER
    if not path.is_file():
        return {}
    try:
        return {str(token["content"]): int(token["id"]) for token in read_json(path).get("added_tokens") or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its added_tokens are damaged ({error!r}), expected content and id") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected a JSON object")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
