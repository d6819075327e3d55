"""Random models on disk, for us and for peers: a checkpoint as transformers reads it, and the bundle of the same file.

The vocabulary is cut with the layers, so that lm_head keeps the share of the work that it has in the whole model.
Tokenizer, chat template and preprocessor are those of the shipped tiny model, with the bounds of Qwen's own images.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.random_checkpoint import random_checkpoint
from export.real_shapes import shape_config
from export.writer import ExportOptions, export

_ALIGNMENT = 4096
# What the released checkpoints call the tensors, after their canonical prefixes.
_PREFIXES = {
    "qwen2_5_vl": {"visual.": "visual.", "language_model.": "model."},
    "qwen3_vl": {"visual.": "model.visual.", "language_model.": "model.language_model."},
    "qwen3_5": {"visual.": "model.visual.", "language_model.": "model.language_model."},
}
_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
_TINY = Path(__file__).parent.parent / "examples" / "tiny-vlm"
_SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PREPROCESSOR = "preprocessor_config.json"
_MAX_TOKENS = 16384  # of an image


def cut_config(shape: str, layers: int, vision_layers: int) -> dict[str, Any]:
    """config.json of a released model with fewer layers and the vocabulary cut in proportion.

    The special tokens are the tiny model's.
    """
    whole, config = shape_config(shape), shape_config(shape, layers, vision_layers)
    text = config["text_config"]
    text["vocab_size"] = text["vocab_size"] * layers // whole["text_config"]["num_hidden_layers"] // 64 * 64
    tiny = json.loads((_TINY / "config.json").read_text())
    text |= {name: tiny["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return config | {name: tiny[name] for name in _IDS} | {"eos_token_id": tiny["text_config"]["eos_token_id"]}


def make_model(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write a float32 checkpoint of random weights and a bundle over the same file; what is there is taken.

    Returns:
        The folders of the checkpoint and of the bundle.
    """
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not (checkpoint / _PREPROCESSOR).is_file():  # the last that is written
        checkpoint.mkdir(parents=True, exist_ok=True)
        made = random_checkpoint(checkpoint, config)
        _write_tensors(checkpoint / "model.safetensors", made, _PREFIXES[config["model_type"]])
        for name in _SMALL_FILES:
            shutil.copyfile(_TINY / name, checkpoint / name)
        preprocessor = json.loads((_TINY / _PREPROCESSOR).read_text())
        vision = config["vision_config"]
        preprocessor["patch_size"] = vision["patch_size"]
        preprocessor["size"]["longest_edge"] = _MAX_TOKENS * (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        (checkpoint / _PREPROCESSOR).write_text(json.dumps(preprocessor), encoding="utf-8")
    export(checkpoint, bundle, ExportOptions(link=True))
    return checkpoint, bundle


def _write_tensors(path: Path, checkpoint: Checkpoint, prefixes: Mapping[str, str]) -> None:
    """Stream all tensors into a safetensors file, whose data begins on a page."""
    described: dict[str, Any] = {}
    position = 0
    names = checkpoint.unused()  # nothing was asked for yet: all of them
    for name in names:
        shape = checkpoint.tensor(name).shape
        written = next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
        end = position + 4 * math.prod(shape)
        described[written] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            for block in checkpoint.tensor(name).blocks():
                out.write(block.view(np.uint8).data)
    partial.rename(path)
