"""Linear attention as Qwen3.5 has it: a causal convolution, then the gated delta rule over a state a head.

For one head, with the state S [key_head_dim, value_head_dim], zeros before the prompt, and q, k of norm 1:

    q, k, v = silu(conv(W_qkv h))          causal and depthwise; the last inputs are the state past_conv
    g = -exp(A_log) softplus(W_a h + dt_bias)                        beta = sigmoid(W_b h)
    S <- exp(g) S + beta k (v - exp(g) S^T k)^T                      o = S^T q / sqrt(key_head_dim)
    out = W_out (rms_norm(o) * silu(W_z h))

Each key head serves num_value_heads / num_key_heads value heads in a row. For ONNX Runtime's providers of the targets
cpu and cuda the operators are its own, of com.microsoft; TensorRT has none, so for tensorrt and portable all is written
in standard operators (delta_rule.py). Everything between the projections is float32: the CUDA provider has no bfloat16
kernels for its operators, and rounding states would add up over a prompt.
There is no bias, so a token of zeros stays zeros and leaves states of zeros as they are: prompts are padded with such.
"""

from dataclasses import dataclass

import numpy as np

from hawk_trt.stages import CPU, CUDA, LanguageConfig, LinearAttentionConfig

from .attention import add_and_mlp, language_norm
from .delta_rule import Chunks, chunks_of, delta_rule
from .graph import END, ORT_DOMAIN, GraphBuilder, Value
from .layers import linear, rms

# Added to the squares of a query or key before they are normed.
_NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class LinearContext:
    """What all linear layers of one graph share."""

    batch_seq: Value  # int64 [2], (batch, seq)
    chunks: Chunks | None  # of its tokens; None where the runtime has operators for linear layers


def linear_context(g: GraphBuilder, hidden: Value, name: str) -> LinearContext:
    """Build the shared values. hidden: [batch, seq, hidden]."""
    batch_seq = g.op("Shape", hidden, start=0, end=2, name=name)
    return LinearContext(batch_seq, None if g.target in (CPU, CUDA) else chunks_of(g, batch_seq))


def linear_layer(
    g: GraphBuilder, config: LanguageConfig, context: LinearContext, x: Value, layer: int
) -> tuple[Value, dict[str, Value]]:
    """One linear layer: its output [batch * seq, hidden], and the new states by output name.

    x: the residual stream, [batch * seq, hidden].  layer: its index in the checkpoint.
    """
    weight, hidden, sizes = f"language_model.layers.{layer}", config.hidden_size, config.linear
    assert sizes is not None  # config.is_linear(layer)
    with g.scope(f"layers.{layer}"):
        h = language_norm(g, config, x, f"{weight}.input_layernorm", hidden)
        with g.scope("linear_attn"):
            gated, present = _gated_delta_rule(g, config, sizes, context, h, layer)
            gated = g.cast(gated, "float32", g.dtype, "to_model")
            shape = (hidden, sizes.num_value_heads * sizes.value_head_dim)
            attended = linear(g, gated, f"{weight}.linear_attn.out_proj", shape, bias=False)
        return add_and_mlp(g, config, x, attended, weight), present


def _gated_delta_rule(
    g: GraphBuilder,
    config: LanguageConfig,
    sizes: LinearAttentionConfig,
    context: LinearContext,
    h: Value,
    layer: int,
) -> tuple[Value, dict[str, Value]]:
    """What out_proj takes of the normed residual stream h: [batch * seq, value heads * dim] float32; and new states."""
    weight = f"language_model.layers.{layer}.linear_attn"
    key_dim, value_dim = sizes.num_key_heads * sizes.key_head_dim, sizes.num_value_heads * sizes.value_head_dim

    heads = sizes.num_value_heads

    def float32(name: str, *shape: int) -> Value:
        return g.cast(g.weight(f"{weight}.{name}", *shape), g.dtype, "float32", f"{name}_float32")

    def project(name: str, rows: int) -> Value:
        return linear(g, h, f"{weight}.{name}", (rows, config.hidden_size), bias=False)

    def by_token(x: Value, width: int, name: str) -> Value:
        """[batch * seq, width] -> [batch, seq, width] float32."""
        shape = g.op("Concat", context.batch_seq, g.ints(width), axis=0, name=f"{name}_shape")
        return g.op("Reshape", g.cast(x, g.dtype, "float32", f"{name}_float32"), shape, name=f"{name}_by_token")

    mixed = by_token(project("in_proj_qkv", sizes.conv_dim), sizes.conv_dim, "qkv")
    taps = (sizes.conv_dim, 1, sizes.conv_kernel)
    past_conv, past_state = (g.inputs[name] for name in config.cache_names(layer, past=True))
    if context.chunks is None:
        mixed, conv_state = g.ops(
            "CausalConvWithState",
            g.transpose(mixed, 0, 2, 1, name="channels_first"),
            float32("conv1d.weight", *taps),
            None,
            past_conv,
            activation="silu",
            domain=ORT_DOMAIN,
            name="conv",
            count=2,
        )
        mixed = g.transpose(mixed, 0, 2, 1, name="channels_last")
    else:
        mixed, conv_state = _causal_conv(g, sizes, mixed, float32("conv1d.weight", *taps), past_conv)
    pairs, value = g.ops("Split", mixed, g.ints(2 * key_dim, value_dim), axis=-1, name="split_value", count=2)
    query, key = g.ops("Split", _normed(g, sizes, pairs), num_outputs=2, axis=-1, name="split_key", count=2)
    steps = {name: by_token(project(f"in_proj_{name}", heads), heads, name) for name in "ab"}
    rate = g.op("Softplus", g.op("Add", steps["a"], float32("dt_bias", heads), name="add_dt_bias"), name="rate")
    decay = g.op("Mul", g.op("Neg", g.op("Exp", float32("A_log", heads), name="A"), name="minus_A"), rate, name="decay")
    beta = g.op("Sigmoid", steps["b"], name="beta")
    if context.chunks is None:
        out, state = g.ops(
            "LinearAttention",
            query,
            key,
            value,
            past_state,
            decay,
            beta,
            q_num_heads=sizes.num_key_heads,
            kv_num_heads=sizes.num_value_heads,
            update_rule="gated_delta",
            domain=ORT_DOMAIN,
            name="LinearAttention",
            count=2,
        )
    else:
        with g.scope("delta_rule"):
            out, state = delta_rule(g, context.chunks, sizes, query, key, value, past_state, decay, beta)
    out = g.reshape(out, -1, sizes.value_head_dim, name="by_head")
    out = rms(g, out, float32("norm.weight", sizes.value_head_dim), config.rms_norm_eps, "norm")
    gate = g.cast(project("in_proj_z", value_dim), g.dtype, "float32", "z_float32")
    gate = g.op("Mul", gate, g.op("Sigmoid", gate, name="sigmoid"), name="silu_z")
    gated = g.op("Mul", g.reshape(out, -1, value_dim, name="normed"), gate, name="gated")
    return gated, dict(zip(config.cache_names(layer, past=False), (conv_state, state), strict=True))


def _normed(g: GraphBuilder, sizes: LinearAttentionConfig, pairs: Value) -> Value:
    """Queries and keys of norm 1, x / sqrt(sum x^2 + epsilon), side by side: an RMS norm but for a factor."""
    dim = sizes.key_head_dim
    heads = g.reshape(pairs, 0, 0, 2 * sizes.num_key_heads, dim, name="key_heads")
    heads = rms(g, heads, g.const(np.full(dim, dim**-0.5), "float32"), _NORM_EPSILON / dim, "unit_norm")
    return g.reshape(heads, 0, 0, 2 * sizes.num_key_heads * dim, name="unit_vectors")


def _causal_conv(
    g: GraphBuilder, sizes: LinearAttentionConfig, x: Value, weight: Value, past: Value
) -> tuple[Value, Value]:
    """silu(conv(x)), each channel for itself, as a sum of one shifted product a tap; and the last inputs.

    x: [batch, seq, channels].  weight: [channels, 1, taps].  past: [batch, channels, taps - 1].
    """
    taps = sizes.conv_kernel
    with g.scope("conv"):
        seen = g.op("Concat", g.transpose(past, 0, 2, 1, name="past_channels_last"), x, axis=1, name="with_past")
        rows = g.transpose(g.reshape(weight, sizes.conv_dim, taps, name="taps"), 1, 0, name="by_tap")
        total: Value | None = None
        for tap, row in enumerate(g.ops("Split", rows, axis=0, num_outputs=taps, count=taps, name="tap")):
            part = g.cut(seen, 1, tap, END if tap == taps - 1 else tap + 1 - taps, name=f"shifted_{tap}")
            part = g.op("Mul", part, row, name=f"product_{tap}")
            total = part if total is None else g.op("Add", total, part, name=f"sum_{tap}")
        kept = g.cut(seen, 1, 1 - taps, END, name="last_inputs")
        activated = g.op("Mul", total, g.op("Sigmoid", total, name="sigmoid"), name="silu")
        return activated, g.transpose(kept, 0, 2, 1, name="new_past")
