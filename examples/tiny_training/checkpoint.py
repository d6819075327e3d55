"""The trained model as a checkpoint folder: float16, names as on the hub, the small files of another checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hawk_trt.files.staging import write_atomically

WEIGHTS = "model.safetensors"
# transformers' names and the hub's of Qwen2.5-VL, the longer ones first; Qwen3.5's are alike.
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
_SMALL_FILES = ("*.json", "*.jinja")


def write_checkpoint(weights: Mapping[str, Tensor], like: Path, out: Path) -> None:
    """Write a checkpoint folder.

    Args:
        weights: of transformers' model, by its names; tied embeddings.
        like: checkpoint folder that the config, tokenizer, chat template and image settings are taken from.
        out: the folder.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    if like.resolve() != out.resolve():
        for pattern in _SMALL_FILES:
            for path in sorted(like.glob(pattern)):
                write_atomically(out / path.name, path.read_bytes())
    renamed = json.loads((like / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2_5_vl"
    half = {
        hub_name(name) if renamed else name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in weights.items()
        if name != "lm_head.weight"  # the embeddings once more
    }
    write_atomically(out / WEIGHTS, save(half, metadata={"format": "pt"}))


def hub_name(name: str) -> str:
    """A tensor's name in the files of the hub, by its name in transformers."""
    for own, hub in _PREFIXES:
        if name.startswith(own):
            return hub + name.removeprefix(own)
    return name
