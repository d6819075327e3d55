"""The decoder graph: layers 1 and up, norm, lm_head on the last position, greedy token."""

import onnx_ir as ir

from hawk_trt.stages import DECODER, LanguageConfig, decoder_spec

from .attention import attention_context, decoder_layer
from .graph import GraphBuilder, Weights
from .layers import add_residual, linear, rms_norm

WEIGHT_FILE = f"{DECODER}.data"


def build_decoder(config: LanguageConfig, dtype: str, target: str, weights: Weights) -> ir.Model:
    """Build the decoder graph for a target."""
    g = GraphBuilder(DECODER, dtype, target, weights, WEIGHT_FILE)
    spec = decoder_spec(config, target)
    inputs = g.inputs(spec)
    hidden = inputs["hidden_states"]
    context = attention_context(g, config, inputs, inputs["kept_position_ids"], hidden, first_layer=1)
    x = g.reshape(hidden, -1, config.hidden_size, name="flat_hidden_states")
    outputs: dict[str, ir.Value] = {}
    last = config.num_hidden_layers - 1
    for layer in range(1, config.num_hidden_layers):
        x, present = decoder_layer(g, config, context, x, layer, last_only=layer == last)
        outputs |= present
        if layer < config.deepstack_levels:
            level = g.op("Gather", inputs["deepstack_states"], g.const(layer - 1, "int64"), axis=2, name="level")
            x = add_residual(g, x, g.reshape(level, -1, config.hidden_size, name="flat_level"), "add_deepstack")
    x = rms_norm(g, x, "language_model.norm", config.rms_norm_eps, "norm")
    logits = linear(g, x, "language_model.embed_tokens" if config.tie_word_embeddings else "lm_head", "lm_head")
    if g.dtype == "float32":
        outputs["logits"] = logits
    else:
        outputs["logits"] = g.cast(logits, g.dtype, "float32", "logits_float32")
    outputs["next_token"] = g.op("ArgMax", outputs["logits"], axis=-1, keepdims=0, name="next_token")
    g.outputs(spec, outputs)
    return g.model()
