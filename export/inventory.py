"""Every tensor that a model must have, by canonical name, with its shape.

In: the sizes from config.json. Out: a table to hold the checkpoint against before a graph is built, so that a missing
bias or a config of another size is an error that names the tensor, not a wrong answer.
"""

from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import LanguageConfig

from .checkpoint import EMBEDDINGS, LM_HEAD
from .shapes import Shapes, linear
from .vision import GRAPHS


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
