"""All graphs of a model for a target, and every tensor that they need.

The table of tensors is held against the checkpoint before a graph is built, so that a missing bias or a config of
another size is an error that names the tensor, not a wrong answer.
"""

from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION, LanguageConfig

from .contract import decoder_entry, first_layer_entry
from .decoder import decoder
from .first_layer import first_layer
from .graph import GraphBuilder
from .linear_attention import linear_attention_shapes
from .tensors import EMBEDDINGS, LM_HEAD, Shapes, linear, norm
from .vision import GRAPHS
from .weights import WeightStore


def build_graphs(
    vision: VisionConfig, language: LanguageConfig, weights: WeightStore, dtype: str, target: str, normalization: str
) -> dict[str, GraphBuilder]:
    """Build the three graphs for a target.

    Args:
        vision: sizes of the vision tower.
        language: sizes of the language model.
        weights: places each tensor as it is asked for.
        dtype: "float32", "float16" or "bfloat16".
        target: one of hawk_trt.stages.TARGETS.
        normalization: "l2", "softmax" or "minmax", baked into the first layer.

    Returns:
        The graphs by stage name, each to be finished by model().
    """
    family = GRAPHS[vision.family]
    entries = (
        family.entry(vision, dtype, target),
        first_layer_entry(language, dtype, target),
        decoder_entry(language, dtype, target),
    )
    graphs = {entry.stage: GraphBuilder(entry, dtype, weights) for entry in entries}
    g = graphs[VISION]
    g.outputs(family.build(g, vision))
    g = graphs[FIRST_LAYER]
    g.outputs(first_layer(g, language, normalization))
    g = graphs[DECODER]
    g.outputs(decoder(g, language))
    return graphs


def inventory(language: LanguageConfig, vision: VisionConfig) -> Shapes:
    """Names and shapes of all tensors of a model; a tied one needs no lm_head.weight."""
    return _language_shapes(language) | GRAPHS[vision.family].shapes(vision)


def _language_shapes(language: LanguageConfig) -> Shapes:
    hidden, inner = language.hidden_size, language.intermediate_size
    attended, kv = language.num_attention_heads * language.head_dim, language.num_key_value_heads * language.head_dim
    query = 2 * attended if language.attention_gate else attended
    table = (language.vocab_size, hidden)
    shapes: Shapes = {EMBEDDINGS: table, "language_model.norm.weight": (hidden,)}
    if not language.tie_word_embeddings:
        shapes[LM_HEAD] = table
    for index in range(language.num_hidden_layers):
        layer = f"language_model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        shapes |= {
            **norm(f"{layer}.input_layernorm", hidden, bias=False),
            **norm(f"{layer}.post_attention_layernorm", hidden, bias=False),
            **linear(f"{mlp}.gate_proj", inner, hidden, bias=False),
            **linear(f"{mlp}.up_proj", inner, hidden, bias=False),
            **linear(f"{mlp}.down_proj", hidden, inner, bias=False),
        }
        if language.linear is not None and language.is_linear(index):
            shapes |= linear_attention_shapes(f"{layer}.linear_attn", hidden, language.linear)
            continue
        shapes |= {
            **linear(f"{attention}.q_proj", query, hidden, bias=not language.qk_norm),
            **linear(f"{attention}.k_proj", kv, hidden, bias=not language.qk_norm),
            **linear(f"{attention}.v_proj", kv, hidden, bias=not language.qk_norm),
            **linear(f"{attention}.o_proj", hidden, attended, bias=False),
        }
        if language.qk_norm:
            for letter in "qk":
                shapes |= norm(f"{attention}.{letter}_norm", language.head_dim, bias=False)
    return shapes
