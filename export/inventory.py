"""Every tensor that a model must have, by canonical name, with its shape.

In: the sizes from config.json. Out: a table to hold the checkpoint against before a graph is built, so that a missing
bias or a config of another size is an error that names the tensor, not a wrong answer.
"""

from collections.abc import Mapping
from typing import Any

from export.checkpoint import EMBEDDINGS, LM_HEAD
from hawk_trt.stages import LanguageConfig

Shapes = dict[str, tuple[int, ...]]


def inventory(language: LanguageConfig, vision: Mapping[str, Any]) -> Shapes:
    """Names and shapes of all tensors of a Qwen2.5-VL model; a tied one needs no lm_head.weight."""
    return _language_shapes(language) | _vision_shapes(vision)


def _language_shapes(language: LanguageConfig) -> Shapes:
    hidden, inner = language.hidden_size, language.intermediate_size
    query, kv = language.num_attention_heads * language.head_dim, language.num_key_value_heads * language.head_dim
    table = (language.vocab_size, hidden)
    shapes: Shapes = {EMBEDDINGS: table, "language_model.norm.weight": (hidden,)}
    if not language.tie_word_embeddings:
        shapes[LM_HEAD] = table
    for index in range(language.num_hidden_layers):
        layer = f"language_model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            **_linear(f"{layer}.self_attn.q_proj", query, hidden),
            **_linear(f"{layer}.self_attn.k_proj", kv, hidden),
            **_linear(f"{layer}.self_attn.v_proj", kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def _vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = vision["spatial_merge_size"] ** 2 * hidden
    shapes: Shapes = {
        "visual.patch_embed.proj.weight": (hidden, vision["in_channels"], vision["temporal_patch_size"], patch, patch),
        "visual.merger.ln_q.weight": (hidden,),
        **_linear("visual.merger.mlp.0", merged, merged),
        **_linear("visual.merger.mlp.2", vision["out_hidden_size"], merged),
    }
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        shapes |= {
            f"{block}.norm1.weight": (hidden,),
            f"{block}.norm2.weight": (hidden,),
            **_linear(f"{block}.attn.qkv", 3 * hidden, hidden),
            **_linear(f"{block}.attn.proj", hidden, hidden),
            **_linear(f"{block}.mlp.gate_proj", inner, hidden),
            **_linear(f"{block}.mlp.up_proj", inner, hidden),
            **_linear(f"{block}.mlp.down_proj", hidden, inner),
        }
    return shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
