"""The small files of a checkpoint that go into the bundle: configs, tokenizer, chat template, preprocessor.

In: a checkpoint folder. Out: copies in the bundle, as they are. None but config.json must be there: without a
tokenizer or a preprocessor config the bundle takes tensors only.
"""

import json
from pathlib import Path

from export.checkpoint import CONFIG, GENERATION_CONFIG, read_json
from hawk_trt.errors import CheckpointError

_TOKENIZER = "tokenizer.json"
_PREPROCESSOR = "preprocessor_config.json"
# What transformers 5 writes instead of preprocessor_config.json, which is its "image_processor".
_PROCESSOR = "processor_config.json"
SIDECARS = (
    CONFIG,
    GENERATION_CONFIG,
    _TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    _PREPROCESSOR,
    "video_preprocessor_config.json",
    _PROCESSOR,
)


def copy_sidecars(checkpoint: Path, folder: Path) -> list[str]:
    """Copy what is there of SIDECARS; preprocessor_config.json is taken from processor_config.json if need be.

    Returns:
        The names of the files written.

    Raises:
        CheckpointError: a file of the checkpoint cannot be read.
        OSError: writing failed.
    """
    contents = {name: _read(checkpoint / name) for name in SIDECARS if (checkpoint / name).is_file()}
    if _PROCESSOR in contents and _PREPROCESSOR not in contents:
        image_processor = read_json(checkpoint / _PROCESSOR).get("image_processor")
        if image_processor:
            contents[_PREPROCESSOR] = json.dumps(image_processor, indent=2).encode()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)


def added_tokens(checkpoint: Path) -> dict[str, int]:
    """Content to id of the tokenizer's added tokens; empty without a tokenizer.

    Raises:
        CheckpointError: tokenizer.json is damaged.
    """
    path = checkpoint / _TOKENIZER
    if not path.is_file():
        return {}
    try:
        return {str(token["content"]): int(token["id"]) for token in read_json(path).get("added_tokens") or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its added_tokens are damaged ({error!r}), expected content and id") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
