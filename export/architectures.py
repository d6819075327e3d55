"""Which architectures are supported: the family of a checkpoint, and the reader of its config.json."""

from collections.abc import Mapping
from typing import Any

from hawk_trt.errors import CheckpointError

from . import internvl_config, qwen_config
from .config import ModelConfig, Section

_ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    # the reasoner of Cosmos 3 is a Qwen3-VL
    "Cosmos3ForConditionalGeneration": "qwen3_vl",
    "Cosmos3OmniForConditionalGeneration": "qwen3_vl",
    "InternVLForConditionalGeneration": "internvl",
    "InternVLChatModel": "internvl",
}
# What counts where no architecture is known: transformers reads the model_type alone, and so a trainer's own class.
_MODEL_TYPES = {
    **{name: name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl")},
    **{"internvl_chat": "internvl", "cosmos3_omni": "qwen3_vl"},
}
# Close relatives of what is supported, and why they are not.
_REFUSED = {
    "Qwen3VLMoeForConditionalGeneration": "Its layers are mixtures of experts; take a dense Qwen3-VL, such as the 8B",
    "Qwen3_5MoeForConditionalGeneration": "Its layers are mixtures of experts; take a dense Qwen3.5, such as the 9B",
    "Qwen3_5ForCausalLM": "It has no vision tower; take the whole checkpoint, Qwen3_5ForConditionalGeneration",
    "Cosmos3EdgeForConditionalGeneration": "Its tower is SigLIP2's; take Cosmos-Reason2 or Cosmos3-Nano",
}


def read_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    added_tokens: Mapping[str, int] | None = None,
) -> ModelConfig:
    """Read and check config.json.

    generation: generation_config.json.  added_tokens: content to id of the tokenizer's added tokens.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    family = family_name(config)
    if family == "internvl":
        return internvl_config.read(config, generation or {}, added_tokens or {})
    return qwen_config.read(family, config, generation or {}, added_tokens or {})


def family_name(config: Mapping[str, Any]) -> str:
    """Name of the family of a checkpoint's config.json; CheckpointError for an architecture that is not supported."""
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise Section(config).wrong("architectures", "a list of names")
    model_type = str(config.get("model_type"))
    got = tuple(name[:60] for name in (named or [model_type])[:10])
    for name in got:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    if model_type in _MODEL_TYPES and not set(got) & set(_REFUSED):
        return _MODEL_TYPES[model_type]
    reasons = "".join(f". {_REFUSED[name]}" for name in got if name in _REFUSED)
    raise CheckpointError(f"architecture: got {', '.join(got)}, supported are {', '.join(_ARCHITECTURES)}{reasons}")
