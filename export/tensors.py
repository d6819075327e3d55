"""What a model's tensors are called.

visual.*, language_model.* and lm_head.weight are the canonical names, by which graphs know them. A tensor of a
checkpoint has mostly one, several where a fused tensor holds equal parts, one below the other, and none where it is of
a part that answers do not need.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from hawk_trt.errors import CheckpointError

from .architectures import family_name

EMBEDDINGS = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# The first that fits decides; what fits none keeps its name.
_QWEN_PREFIXES = (
    ("model.language_model.", "language_model."),
    ("model.visual.", "visual."),
    ("model.", "language_model."),
)

# Of InternVL: transformers' names, with and without its model., and the original's. Each pattern is tried on what the
# last one left.
_INTERNVL_RENAMES = (
    (r"^(model\.)?(vision_tower|vision_model)\.", "visual."),
    (r"^visual\.embeddings\.(cls_token|class_embedding)$", "visual.cls_token"),
    (r"^visual\.embeddings\.position_embeddings?$", "visual.position_embeddings"),
    (r"^visual\.embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "visual.patch_embed."),
    (r"^visual\.encoder\.layers?\.", "visual.blocks."),
    (r"^(visual\..*)\.attention\.projection_layer\.", r"\1.attn.proj."),
    (r"^(visual\..*)\.attention\.", r"\1.attn."),
    (r"^(visual\..*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(visual\..*)\.layernorm_after\.", r"\1.norm2."),
    (r"^(visual\..*)\.lambda_([12])$", r"\1.ls\2"),
    (r"^(model\.)?(multi_modal_projector\.layer_norm|mlp1\.0)\.", "visual.merger.norm."),
    (r"^(model\.)?(multi_modal_projector\.linear_1|mlp1\.1)\.", "visual.merger.linear_1."),
    (r"^(model\.)?(multi_modal_projector\.linear_2|mlp1\.3)\.", "visual.merger.linear_2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "language_model."),
)

# Of Cosmos 3, whose reasoner is a Qwen3-VL, flat and with Diffusers' names of attention; beside it lies a generator of
# pictures, sound and actions, by the names of either generation of checkpoints.
_COSMOS_RENAMES = (
    (r"^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\.", r"visual.\1."),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
    (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.to_out\.", ".self_attn.o_proj."),
    (r"\.self_attn\.norm_([qk])\.", r".self_attn.\1_norm."),
)
_COSMOS_GENERATOR = re.compile(
    r"moe_gen|\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.|^(time_embedder|((audio|action)_)?proj_(in|out))\."
    r"|^(llm2(vae|sound|action)|(vae|sound|action)2llm)\.|^(audio|sound|action)_modality_embed"
)

# What has the inner size of a vision tower's gated MLP in front, or last.
_INNER_ROWS = re.compile(r"visual\.blocks\.\d+\.mlp\.(gate|up)_proj\.(weight|bias)")
_INNER_COLUMNS = re.compile(r"visual\.blocks\.\d+\.mlp\.down_proj\.weight")


def padded_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in graphs: zeros fill the inner size of a vision tower's MLP up to a multiple of 64.

    That is where its rows of half precision would not be multiples of 16 bytes, as Qwen2.5-VL's 3,420 are: products of
    such rows take three times as long on a GPU (H200: 208 us and 66 us).
    """
    axis = 0 if _INNER_ROWS.fullmatch(name) else 1 if _INNER_COLUMNS.fullmatch(name) else None
    if axis is None or shape[axis] % 8 == 0:
        return shape
    return (*shape[:axis], -(-shape[axis] // 64) * 64, *shape[axis + 1 :])


def tensor_names(config: Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """What names the tensors of a checkpoint; an unknown architecture's are named as Qwen's."""
    named = config.get("architectures")
    named = named if isinstance(named, list) else []
    if config.get("model_type") == "cosmos3_omni" or any(str(name).startswith("Cosmos3") for name in named):
        return cosmos_names
    try:
        return internvl_names if family_name(config) == "internvl" else qwen_names
    except CheckpointError:  # what is not supported is refused where its sizes are read
        return qwen_names


def qwen_names(name: str) -> tuple[str, ...]:
    """Of the Qwen families: the hub's names (visual.*, model.*) and those of newer saves (model.visual.*, ..)."""
    for prefix, canonical in _QWEN_PREFIXES:
        if name.startswith(prefix):
            return (canonical + name.removeprefix(prefix),)
    return (name,)


def cosmos_names(name: str) -> tuple[str, ...]:
    """Of Cosmos 3; none for what the generator alone needs."""
    if _COSMOS_GENERATOR.search(name):
        return ()
    for pattern, replacement in _COSMOS_RENAMES:
        name = re.sub(pattern, replacement, name)
    return qwen_names(name)


def internvl_names(name: str) -> tuple[str, ...]:
    """Of InternVL, of either make; the original has queries, keys and values in one."""
    for pattern, replacement in _INTERNVL_RENAMES:
        name = re.sub(pattern, replacement, name)
    if name.startswith("visual.") and ".attn.qkv." in name:
        return tuple(name.replace(".qkv.", f".{part}_proj.") for part in "qkv")
    return (name,)
