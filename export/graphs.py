"""All graphs of a model for a target, and every tensor that they need.

The table of tensors is held against the checkpoint before a graph is built, so that a missing bias or a config of
another size is an error that names the tensor, not a wrong answer.
"""

import onnx_ir as ir

from hawk_trt.models.family import Family
from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION, LanguageConfig

from .decoder import build_decoder
from .first_layer import build_first_layer
from .graph import Weights
from .tensors import EMBEDDINGS, LM_HEAD, Shapes, linear
from .vision import GRAPHS


def build_graphs(
    family: Family,
    language: LanguageConfig,
    weights: Weights,
    dtype: str,
    target: str,
    normalization: str,
) -> dict[str, ir.Model]:
    """Build the three graphs for a target.

    Args:
        family: of the model, with its vision sizes.
        language: sizes of the language model.
        weights: places each tensor as it is asked for.
        dtype: "float32", "float16" or "bfloat16".
        target: one of hawk_trt.stages.TARGETS.
        normalization: "l2", "softmax" or "minmax", baked into the first layer.

    Returns:
        The models by stage name.
    """
    return {
        VISION: GRAPHS[family.name].build(family.vision_spec(), family.vision, dtype, target, weights),
        FIRST_LAYER: build_first_layer(language, dtype, target, normalization, weights),
        DECODER: build_decoder(language, dtype, target, weights),
    }


def inventory(language: LanguageConfig, vision: VisionConfig) -> Shapes:
    """Names and shapes of all tensors of a model; a tied one needs no lm_head.weight."""
    return _language_shapes(language) | GRAPHS[vision.family].shapes(vision)


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
            **linear(f"{layer}.self_attn.q_proj", query, hidden, bias=not language.qk_norm),
            **linear(f"{layer}.self_attn.k_proj", kv, hidden, bias=not language.qk_norm),
            **linear(f"{layer}.self_attn.v_proj", kv, hidden, bias=not language.qk_norm),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
        if language.qk_norm:
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{name}.weight"] = (language.head_dim,)
    return shapes
