"""The parts that language and vision graphs share: linear, norms, rotary embedding, gated MLP.

Activations are 2-D [tokens, features] between the parts, so that every weight keeps the checkpoint's
[out, in] layout in Gemm(transB=1): nothing is transposed at export, and a bundle can point into the
checkpoint's own files.
"""

from typing import Any

import numpy as np

from hawk_trt.stages import CUDA

from .graph import END, ORT_DOMAIN, GraphBuilder, Value
from .weights import QuantisedMatrix

# How far beyond 65,504 the inner values of a float16 MLP may go: a power of two, so that scaling is exact.
_FLOAT16_HEADROOM = 64.0
# Small enough that a float16 sum with it stays finite, large enough that exp() of it is 0.
_MASKED = {"float32": -1e9, "bfloat16": -1e9, "float16": -1e4}


def linear(
    g: GraphBuilder, x: Value, weight: str, shape: tuple[int, int], *, bias: bool = True, name: str = ""
) -> Value:
    """X W^T + b: [tokens, in] -> [tokens, out].

    weight: what the names of its tensors begin with; its last word is the node's name unless that is given.
    shape: (out, in).
    """
    biases = [g.weight(f"{weight}.bias", shape[0])] if bias else []
    return _product(g, x, weight, shape, name or _last_word(weight), *biases)


def _product(g: GraphBuilder, x: Value, weight: str, shape: tuple[int, int], name: str, *bias: Value) -> Value:
    """X W^T, and the bias where one is given. Weights that are quantised are so in the graph."""
    found = g.quantised(f"{weight}.weight", shape)
    if found is None:
        matrix = g.weight(f"{weight}.weight", *shape)
        if bias and g.bias_apart:
            return g.op("Add", g.op("Gemm", x, matrix, transB=1, name=name), *bias, name=f"{name}/add_bias")
        return g.op("Gemm", x, matrix, *bias, transB=1, name=name)
    if found.is_float8:
        return _float8_product(g, x, found, name, *bias)
    if found.order is not None:
        x = g.op("Gather", x, found.order.name, axis=1, name=f"{name}/inputs_by_group")
    zeros = [] if found.zero_points is None else [found.zero_points.name]
    scaled: dict[str, Any] = {"axis": 1} if found.by_row else {"axis": 0, "block_size": found.block_size}
    matrix = g.op(
        "DequantizeLinear", found.values.name, found.scales.name, *zeros, name=f"{name}/dequantised", **scaled
    )
    y = g.op("MatMul", x, matrix, name=name)
    if found.shift is not None:
        # sum_i x_i (q_i - z) s = sum_i x_i q_i s - z s sum_i x_i; the mean stays in float16's range where a sum may not
        blocks = g.reshape(x, 0, -1, found.block_size, name=f"{name}/blocks")
        means = g.op("ReduceMean", blocks, g.ints(2), keepdims=0, name=f"{name}/block_means")
        y = g.op("Add", y, g.op("MatMul", means, found.shift.name, name=f"{name}/shift"), name=f"{name}/shifted")
    return g.op("Add", y, *bias, name=f"{name}/add_bias") if bias else y


def _float8_product(g: GraphBuilder, x: Value, found: QuantisedMatrix, name: str, *bias: Value) -> Value:
    """The same of float8 weights, with the activations in float8 too where their scale was calibrated."""
    if found.input_scale is not None:
        x = g.op(
            "QuantizeLinear", x, found.input_scale.name, g.const(0, "float8_e4m3fn"), name=f"{name}/quantised_input"
        )
        x = g.op("DequantizeLinear", x, found.input_scale.name, name=f"{name}/input")
    # block_size 0, the operator's default, means a scale for each row
    scaled: dict[str, Any] = {"axis": 1 if found.block_size else 0, "block_size": found.block_size}
    parts = (found.values.name, found.scales.name)
    matrix = g.op("DequantizeLinear", *parts, name=f"{name}/dequantised", **scaled)
    matrix = g.cast(matrix, found.scales_dtype, g.dtype, f"{name}/to_model")
    return g.op("Gemm", x, matrix, *bias, transB=1, name=name)


def rms_norm(
    g: GraphBuilder,
    x: Value,
    weight: str,
    size: int,
    epsilon: float,
    source: str | None = None,
    *,
    unit_offset: bool = False,
) -> Value:
    """RMS norm over the last axis, computed in float32; out in the model's dtype.

    source: dtype of x, None where x is the residual stream.  unit_offset: it multiplies by 1 + weight.
    """
    # ONNX Runtime's CUDA provider adds to the residual stream and norms the sum in one kernel
    fused = g.target == CUDA and source is None and (not unit_offset or g.residual == "float32")
    terms = g.take_sum(x) if fused else ()
    scale, source = g.weight(f"{weight}.weight", size), source or g.residual
    with g.scope(_last_word(weight)):
        if unit_offset:
            x, scale, source = g.cast(x, source, "float32", "to_float32"), offset_scale(g, scale), "float32"
        elif g.opset24:
            scale = g.cast(scale, g.dtype, source, "scale_residual")
        if terms:
            made: dict[str, Any] = {"also": ("", "", x), "name": "add_and_norm", "domain": ORT_DOMAIN}
            y = g.op("SkipSimplifiedLayerNormalization", *terms, scale, epsilon=epsilon, **made)
        elif g.opset24 or unit_offset:
            y = rms(g, x, scale, epsilon, "RMSNormalization")
        else:
            h = g.cast(x, source, "float32", "to_float32")
            h = g.op("Mul", h, inverse_rms(g, h, epsilon), name="normalize")
            return g.op("Mul", g.cast(h, "float32", g.dtype, "to_model"), scale, name="scale")
        return g.cast(y, source, g.dtype, "to_model")


def rms(g: GraphBuilder, x: Value, scale: Value, epsilon: float, name: str) -> Value:
    """RMS norm over the last axis, computed in float32; scale has x's dtype, which is float32 in portable graphs."""
    if g.opset24:
        return g.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon, stash_type=1, name=name)
    with g.scope(name):
        return g.op("Mul", g.op("Mul", x, inverse_rms(g, x, epsilon), name="normalize"), scale, name="scale")


def offset_scale(g: GraphBuilder, weight: Value) -> Value:
    """1 + weight in float32, where the model's dtype may have no number between 1 and the next."""
    return g.op("Add", g.cast(weight, g.dtype, "float32", "offset"), g.const(1.0, "float32"), name="scale")


def layer_norm(g: GraphBuilder, x: Value, weight: str, size: int, epsilon: float) -> Value:
    """Layer norm of the residual stream, computed in float32: residual dtype in, model dtype out."""
    with g.scope(_last_word(weight)):
        h = g.cast(x, g.residual, "float32", "to_float32")
        scale, bias = (
            g.cast(g.weight(f"{weight}.{part}", size), g.dtype, "float32", f"{part}_float32")
            for part in ("weight", "bias")
        )
        y = g.op("LayerNormalization", h, scale, bias, axis=-1, epsilon=epsilon, name="LayerNormalization")
        return g.cast(y, "float32", g.dtype, "to_model")


def inverse_rms(g: GraphBuilder, x: Value, epsilon: float) -> Value:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as size 1; float32 in and out."""
    square = g.op("Mul", x, x, name="square")
    mean = g.op("ReduceMean", square, g.ints(-1), keepdims=1, name="mean_square")
    root = g.op("Sqrt", g.op("Add", mean, g.const(epsilon, "float32"), name="add_epsilon"), name="rms")
    return g.op("Reciprocal", root, name="inverse_rms")


def rotary(
    g: GraphBuilder, x: Value, cos: Value, sin: Value, name: str, rotary_dim: int = 0, num_heads: int = 0
) -> Value:
    """Rotate the halves of each head, or of its first rotary_dim numbers where that is not 0.

    x: [batch, heads, seq, dim], or [batch, seq, heads * dim] where num_heads says how many; cos, sin: [batch, seq,
    dim / 2], or half of rotary_dim.
    """
    with g.scope(name):
        if g.opset24:
            sizes = {"rotary_embedding_dim": rotary_dim, "num_heads": num_heads}
            given: dict[str, Any] = {key: size for key, size in sizes.items() if size}
            # the input left out is there to be looked at: ONNX Runtime 1.28 does before GroupQueryAttention
            absent = [None] if num_heads else []
            return g.op("RotaryEmbedding", x, cos, sin, *absent, name="RotaryEmbedding", **given)
        cos, sin = (g.unsqueeze(t, 1, name=f"{word}_heads") for t, word in ((cos, "cos"), (sin, "sin")))
        still: list[Value] = []
        if rotary_dim:
            still = [g.cut(x, -1, rotary_dim, END, name="still")]
            x = g.cut(x, -1, 0, rotary_dim, name="turned")
        low, high = g.ops("Split", x, axis=-1, num_outputs=2, count=2, name="halves")
        new_low = g.op(
            "Sub", g.op("Mul", low, cos, name="low_cos"), g.op("Mul", high, sin, name="high_sin"), name="new_low"
        )
        new_high = g.op(
            "Add", g.op("Mul", high, cos, name="high_cos"), g.op("Mul", low, sin, name="low_sin"), name="new_high"
        )
        return g.op("Concat", new_low, new_high, *still, axis=-1, name="join")


def rotary_float32(g: GraphBuilder, x: Value, cos: Value, sin: Value, name: str) -> Value:
    """Rotary embedding computed in float32; model dtype in and out, cos and sin in float32."""
    turned = rotary(g, g.cast(x, g.dtype, "float32", f"{name}_float32"), cos, sin, name)
    return g.cast(turned, "float32", g.dtype, f"{name}_model")


def attention(
    g: GraphBuilder,
    query: Value,
    key: Value,
    value: Value,
    scale: float,
    mask: Value | None = None,
) -> Value:
    """softmax(scale q k^T, masked) v: [batch, heads, seq, dim].

    query: [batch, heads, seq, dim].  key, value: [batch, heads, total, dim]; with opset 24 they may have fewer heads,
    each for a group of the query's.  mask: broadcast to [batch, heads, seq, total]; bool with opset 24, True where a
    query may look, else the bias that is added.
    """
    if g.opset24:
        return g.op("Attention", query, key, value, mask, scale=scale, name="Attention")
    scaled = g.op("Mul", query, g.scalar(scale), name="scale_q")
    return weighted_values(g, scaled, g.transpose(key, 0, 1, 3, 2, name="k_transposed"), value, mask)


def mask_bias(g: GraphBuilder, seen: Value) -> Value:
    """What attention adds to the scores where it takes no bool mask: 0 where seen, else almost -infinity."""
    return g.op("Where", seen, g.scalar(0.0), g.scalar(_MASKED[g.dtype]), name="bias")


def weighted_values(
    g: GraphBuilder, query: Value, key_columns: Value, value: Value, bias: Value | None = None
) -> Value:
    """softmax(q k^T + bias) v in separate operators. query: scaled; key_columns: [batch, heads, dim, total]."""
    scores = g.op("MatMul", query, key_columns, name="qk")
    if bias is not None:
        scores = g.op("Add", scores, bias, name="masked")
    return g.op("MatMul", g.op("Softmax", scores, axis=-1, name="softmax"), value, name="av")


def gated_mlp(g: GraphBuilder, x: Value, weight: str, hidden: int, inner: int, *, bias: bool = False) -> Value:
    """down(silu(gate(x)) * up(x)): [tokens, hidden] in the model's dtype -> [tokens, hidden] in the residual's."""
    down_proj = f"{weight}.down_proj"
    with g.scope("mlp"):
        gate = linear(g, x, f"{weight}.gate_proj", (inner, hidden), bias=bias)
        up = linear(g, x, f"{weight}.up_proj", (inner, hidden), bias=bias)
        silu = g.op("Mul", gate, g.op("Sigmoid", gate, name="sigmoid"), name="silu")
        if g.dtype == "float16":
            return _unscaled_linear(g, _float16_gated(g, silu, up), down_proj, (hidden, inner), bias=bias)
        gated = g.op("Mul", silu, up, name="gated")
        down = linear(g, gated, down_proj, (hidden, inner), bias=bias)
        return g.cast(down, g.dtype, g.residual, "to_residual")


def _float16_gated(g: GraphBuilder, silu: Value, up: Value) -> Value:
    """Silu * up, scaled down by the headroom, where both the product and its projection may pass float16's 65,504.

    The product is made in float32 and scaled by a power of two, which costs no digits; the scale is undone in
    float32 behind the projection. [tokens, intermediate] float16 in and out.
    """
    silu, up = (g.cast(t, "float16", "float32", f"{n}_float32") for t, n in ((silu, "silu"), (up, "up")))
    scaled = g.op("Mul", silu, g.const(1 / _FLOAT16_HEADROOM, "float32"), name="scaled_silu")
    product = g.op("Mul", scaled, up, name="gated")
    bound = float(np.finfo(np.float16).max)
    product = g.op("Clip", product, g.const(-bound, "float32"), g.const(bound, "float32"), name="bounded")
    return g.cast(product, "float32", "float16", "gated_float16")


def wide_linear(g: GraphBuilder, x: Value, weight: str, shape: tuple[int, int]) -> Value:
    """X W^T + b where it may pass float16's range: [tokens, in] model dtype -> [tokens, out] residual dtype."""
    if g.dtype != "float16":
        return g.cast(linear(g, x, weight, shape), g.dtype, g.residual, f"{_last_word(weight)}_residual")
    scaled = g.op("Mul", x, g.scalar(1 / _FLOAT16_HEADROOM), name="scaled")
    return _unscaled_linear(g, scaled, weight, shape, bias=True)


def _unscaled_linear(g: GraphBuilder, scaled: Value, weight: str, shape: tuple[int, int], *, bias: bool) -> Value:
    """The linear layer of an input that was scaled down by the headroom: float16 -> float32."""
    y = _product(g, scaled, weight, shape, _last_word(weight))
    y = g.op("Mul", g.cast(y, "float16", "float32", "float32"), g.const(_FLOAT16_HEADROOM, "float32"), name="unscaled")
    if not bias:
        return y
    added = g.cast(g.weight(f"{weight}.bias", shape[0]), "float16", "float32", "bias_float32")
    return g.op("Add", y, added, name="add_bias")


def add_residual(g: GraphBuilder, x: Value, y: Value, name: str) -> Value:
    """Add y, in the model's dtype, to the residual stream x."""
    return g.op("Add", x, g.cast(y, g.dtype, g.residual, f"{name}_cast"), name=name)


def _last_word(weight: str) -> str:
    return weight.rpartition(".")[2]
