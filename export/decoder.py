"""The decoder graph: the layers behind the scoring layer, norm, lm_head on the last position, greedy token."""

from hawk_trt.errors import CheckpointError
from hawk_trt.stages import LanguageConfig

from .attention import attention_context, decoder_layer, language_norm, last_rows
from .graph import GraphBuilder, Value
from .layers import add_residual, linear
from .linear_attention import linear_context, linear_layer


def decoder(g: GraphBuilder, config: LanguageConfig) -> dict[str, Value]:
    """Add the nodes of the decoder graph."""
    hidden = g.inputs["hidden_states"]
    layers = config.decoder_layers
    if not layers:
        raise CheckpointError(
            "config.json: num_hidden_layers: got 1, expected at least 2: the first scores, others read what it keeps"
        )
    full_layer = next(layer for layer in layers if not config.is_linear(layer))
    context = attention_context(g, config, g.inputs["kept_position_ids"], hidden, full_layer)
    linears = None if config.linear is None else linear_context(g, hidden, "batch_seq")
    x = g.reshape(hidden, -1, config.hidden_size, name="flat_hidden_states")
    outputs: dict[str, Value] = {}
    last = config.num_hidden_layers - 1
    for layer in layers:
        if linears is not None and config.is_linear(layer):
            x, present = linear_layer(g, config, linears, x, layer)
            if layer == last:
                x = last_rows(g, x, linears.batch_seq, config.hidden_size, "last")
        else:
            x, present = decoder_layer(g, config, context, x, layer, last_only=layer == last)
        outputs |= present
        if layer < config.deepstack_levels:
            level = g.op("Gather", g.inputs["deepstack_states"], g.const(layer - 1, "int64"), axis=2, name="level")
            x = add_residual(g, x, g.reshape(level, -1, config.hidden_size, name="flat_level"), "add_deepstack")
    x = language_norm(g, config, x, "language_model.norm", config.hidden_size)
    head = "language_model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = linear(g, x, head, (config.vocab_size, config.hidden_size), bias=False, name="lm_head")
    logits = g.cast(logits, g.dtype, "float32", "logits_float32")
    return outputs | {"logits": logits, "next_token": g.op("ArgMax", logits, axis=-1, keepdims=0, name="next_token")}
