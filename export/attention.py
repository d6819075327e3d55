"""Causal attention over a KV cache, and the decoder layer around it, for every target.

    portable   Concat the new keys and values to the past, and MatMul - Add - Softmax - MatMul over them, the key and
               value heads repeated for each query head: so written TensorRT fuses it and keeps no score tensor. The
               new ones alone are outputs, which the runtime puts into the cache
    cuda       in half precision ONNX Runtime's own GroupQueryAttention does all of that, without a mask and without a
               transpose. Several tokens are a prompt, which begins at the first column; one token may be a decode step
    others     TensorScatter them into the cache, then the Attention op with an explicit mask; tensorrt lets it end at
               the length of context_slots

The mask is built in the graph: column c is seen by row r at cache position p = write_index + r where
kv_start <= c <= p; a padding row sees itself, so that it stays finite. Prompts of cuda have no padding.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.stages import CONTEXT_SLOTS, CUDA, LanguageConfig

from .graph import END, ORT_DOMAIN, GraphBuilder, Value
from .layers import add_residual, attention, gated_mlp, linear, mask_bias, rms_norm, rotary


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What all layers of one graph share."""

    query_shape: Value
    key_shape: Value  # int64, (batch, seq, heads, dim) for Reshape; for GroupQueryAttention (batch, seq, heads * dim)
    # bool [batch, 1, seq, total], True where a row may look; portable: the bias that is added, alike in shape
    mask: Value | None
    grouped: tuple[Value, Value] | None  # what GroupQueryAttention takes in place of a mask, see _lengths
    cos: Value
    sin: Value  # [batch, seq, rotary_dim / 2]
    write_index: Value | None  # int64 [batch], None in portable graphs
    context_len: Value | None  # int64 [1], columns of the cache that attention reads; None where it reads all


def attention_context(
    g: GraphBuilder,
    config: LanguageConfig,
    position_ids: Value,
    hidden: Value,
    full_layer: int,
) -> AttentionContext:
    """Build the shared values once a graph. hidden: [batch, seq, hidden]; full_layer: one of the graph's."""
    is_grouped = g.target == CUDA and g.dtype != "float32"  # the kernel is of half precision
    with g.scope("attention_shape"):
        batch_seq = g.op("Shape", hidden, start=0, end=2, name="batch_seq")
        query_shape, key_shape = (
            g.op(
                "Concat",
                batch_seq,
                g.ints(heads * config.head_dim) if is_grouped else g.ints(heads, config.head_dim),
                axis=0,
                name=name,
            )
            for heads, name in ((config.num_attention_heads, "query"), (config.num_key_value_heads, "key"))
        )
        seq_len = g.op("Shape", hidden, start=1, end=2, name="seq_len")
    cos, sin = _rotary_tables(g, config, position_ids)
    write_index, slots = g.inputs.get("write_index"), g.inputs.get(CONTEXT_SLOTS)
    context_len = None if slots is None else g.op("Shape", slots, name="context_len")
    past_len = g.op("Shape", g.inputs[config.cache_names(full_layer, past=True)[0]], start=2, end=3, name="past_len")
    mask = grouped = None
    if is_grouped:
        grouped = _lengths(g, past_len, seq_len)
    else:
        mask = _mask(g, g.inputs.get("kv_start"), write_index, past_len, context_len or past_len, seq_len)
    return AttentionContext(query_shape, key_shape, mask, grouped, cos, sin, write_index, context_len)


def decoder_layer(
    g: GraphBuilder,
    config: LanguageConfig,
    context: AttentionContext,
    x: Value,
    layer: int,
    *,
    last_only: bool = False,
) -> tuple[Value, dict[str, Value]]:
    """One layer: its output [batch * seq, hidden] in the residual dtype, and the outputs for the cache by name.

    x: the residual stream, [batch * seq, hidden].  layer: its index in the checkpoint.  last_only: the output of the
    last position alone, [batch, hidden]: all that the logits need after the last layer.
    """
    weight, hidden, dim = f"language_model.layers.{layer}", config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * dim, config.num_key_value_heads * dim

    def project(h: Value, n: str, rows: int) -> Value:
        return linear(g, h, f"{weight}.self_attn.{n}_proj", (rows, hidden), bias=not config.qk_norm)

    def turned(h: Value, n: str, heads: int, shape: Value, cos: Value, sin: Value) -> Value:
        if config.qk_norm:
            h = g.reshape(h, -1, dim, name=f"{n}_by_head")
            h = language_norm(g, config, h, f"{weight}.self_attn.{n}_norm", dim, g.dtype)
        h = _heads(g, context, h, shape, n)
        heads = 0 if context.grouped is None else heads
        return rotary(g, h, cos, sin, f"rotary_{n}", config.rotary_dim, heads)

    with g.scope(f"layers.{layer}"):
        h = language_norm(g, config, x, f"{weight}.input_layernorm", hidden)
        with g.scope("self_attn"):
            cos, sin, mask, query_shape = context.cos, context.sin, context.mask, context.query_shape
            key = turned(project(h, "k", kv_width), "k", config.num_key_value_heads, context.key_shape, cos, sin)
            value = _heads(g, context, project(h, "v", kv_width), context.key_shape, "v")
            if last_only and mask is not None:
                h, x = (last_rows(g, t, query_shape, hidden, n) for t, n in ((h, "normed"), (x, "residual")))
                # the reshapes say that one position is left, which TensorRT does not see in a Slice
                half = (config.rotary_dim or dim) // 2
                cos, sin = (
                    g.reshape(_last(g, t, 1, n), -1, 1, half, name=f"{n}_one") for t, n in ((cos, "cos"), (sin, "sin"))
                )
                mask = g.reshape(_last(g, mask, 2, "mask"), 0, 1, 1, -1, name="mask_one")
                query_shape = g.ints(-1, 1, config.num_attention_heads, dim)
            query, gate = project(h, "q", 2 * width if config.attention_gate else width), None
            if config.attention_gate:
                query, gate = _query_and_gate(g, config, query)
            query = turned(query, "q", config.num_attention_heads, query_shape, cos, sin)
            attended, present = _attend(g, config, context, query, key, value, mask, layer)
            if gate is not None:
                attended = g.op("Mul", attended, g.op("Sigmoid", gate, name="gate"), name="gated")
            if last_only and mask is None:  # GroupQueryAttention takes as many queries as keys
                attended, x = (
                    last_rows(g, t, context.query_shape, size, n)
                    for t, size, n in ((attended, width, "attended"), (x, hidden, "residual"))
                )
            attended = linear(g, attended, f"{weight}.self_attn.o_proj", (hidden, width), bias=False)
        return add_and_mlp(g, config, x, attended, weight), present


def add_and_mlp(g: GraphBuilder, config: LanguageConfig, x: Value, attended: Value, weight: str) -> Value:
    """The second half of a layer: what the attention gave is added to the residual stream x, then the MLP's output."""
    x = add_residual(g, x, attended, "add_attention")
    h = language_norm(g, config, x, f"{weight}.post_attention_layernorm", config.hidden_size)
    h = gated_mlp(g, h, f"{weight}.mlp", config.hidden_size, config.intermediate_size)
    return g.op("Add", x, h, name="add_mlp")


def language_norm(
    g: GraphBuilder, config: LanguageConfig, x: Value, weight: str, size: int, source: str | None = None
) -> Value:
    """RMS norm as the language model has it; see layers.rms_norm."""
    return rms_norm(g, x, weight, size, config.rms_norm_eps, source, unit_offset=config.unit_offset_norms)


def last_rows(g: GraphBuilder, x: Value, shape: Value, hidden: int, name: str) -> Value:
    """[batch * seq, hidden] -> the last position of each row of the batch, [batch, hidden]; shape: (batch, seq, ..)."""
    batch_seq = g.cut(shape, 0, 0, 2, name=f"{name}_batch_seq")
    full_shape = g.op("Concat", batch_seq, g.ints(hidden), axis=0, name=f"{name}_shape")
    rows = _last(g, g.op("Reshape", x, full_shape, name=f"{name}_rows"), 1, name)
    return g.reshape(rows, -1, hidden, name=f"{name}_flat")


def _query_and_gate(g: GraphBuilder, config: LanguageConfig, x: Value) -> tuple[Value, Value]:
    """[tokens, heads * 2 * dim], a query and a gate of each head -> both as [tokens, heads * dim]."""
    heads, dim = config.num_attention_heads, config.head_dim
    split = g.ops(
        "Split",
        g.reshape(x, -1, heads, 2 * dim, name="by_head"),
        axis=-1,
        num_outputs=2,
        count=2,
        name="query_and_gate",
    )
    query, gate = (g.reshape(part, -1, heads * dim, name=name) for part, name in zip(split, ("q", "gate"), strict=True))
    return query, gate


def _heads(g: GraphBuilder, context: AttentionContext, x: Value, shape: Value, name: str) -> Value:
    """[tokens, heads * dim], or a row a head -> [batch, heads, seq, dim], or as GroupQueryAttention takes them."""
    x = g.op("Reshape", x, shape, name=f"{name}_split")
    return x if context.grouped is not None else g.transpose(x, 0, 2, 1, 3, name=f"{name}_heads")


def _last(g: GraphBuilder, x: Value, axis: int, name: str) -> Value:
    """The last index of an axis, kept as size 1."""
    return g.cut(x, axis, -1, END, name=f"last_{name}")


def _attend(
    g: GraphBuilder,
    config: LanguageConfig,
    context: AttentionContext,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    layer: int,
) -> tuple[Value, dict[str, Value]]:
    """Update the cache and attend: what _heads gave in, [tokens, heads * dim] out."""
    scale = float(config.head_dim**-0.5)
    width = config.num_attention_heads * config.head_dim
    past = [g.inputs[name] for name in config.cache_names(layer, past=True)]
    if context.grouped is not None:
        attended, key, value = g.ops(
            "GroupQueryAttention",
            *(query, key, value, *past, *context.grouped),
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=scale,
            domain=ORT_DOMAIN,
            name="GroupQueryAttention",
            count=3,
        )
    elif context.write_index is not None:
        key, value = (
            g.op("TensorScatter", cache, new, context.write_index, axis=-2, mode="linear", name=f"cache_{n}")
            for cache, new, n in ((past[0], key, "k"), (past[1], value, "v"))
        )
        # the outputs of TensorScatter are the graph's: TensorRT takes nothing in between
        read = (_used_columns(g, context, key, "k"), _used_columns(g, context, value, "v"))
    else:
        whole_key, whole_value = (
            g.op("Concat", cache, new, axis=2, name=f"cache_{n}")
            for cache, new, n in ((past[0], key, "k"), (past[1], value, "v"))
        )
        read = (_repeated(g, config, whole_key, "k"), _repeated(g, config, whole_value, "v"))
    if context.grouped is None:
        attended = attention(g, query, *read, scale, mask)
        attended = g.transpose(attended, 0, 2, 1, 3, name="join_heads")
    present = dict(zip(config.cache_names(layer, past=False), (key, value), strict=True))
    return g.reshape(attended, -1, width, name="flat"), present


def _used_columns(g: GraphBuilder, context: AttentionContext, cache: Value, name: str) -> Value:
    """The columns of a cache that attention reads."""
    if context.context_len is None:
        return cache
    return g.op("Slice", cache, g.ints(0), context.context_len, g.ints(2), name=f"used_{name}")


def _repeated(g: GraphBuilder, config: LanguageConfig, x: Value, name: str) -> Value:
    """Each key or value head once for every query head of its group: [batch, heads, total, dim]."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads == kv_heads:
        return x
    groups = g.unsqueeze(x, 2, name=f"{name}_groups")
    groups = g.op("Expand", groups, g.ints(1, 1, heads // kv_heads, 1, 1), name=f"{name}_repeated")
    return g.reshape(groups, 0, heads, -1, config.head_dim, name=f"{name}_by_head")


def _rotary_tables(g: GraphBuilder, config: LanguageConfig, position_ids: Value) -> tuple[Value, Value]:
    """Cos and sin [batch, seq, rotary / 2], model dtype, angles in float32. position_ids: [axes, batch, seq]."""
    axis_of = _axis_of_frequency(config)
    rotary_dim = config.rotary_dim or config.head_dim
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    inv_freq = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    with g.scope("rotary_tables"):
        picked = g.op("Gather", position_ids, g.const(axis_of, "int64"), axis=0, name="axis_of_dim")
        angles = g.op(
            "Mul",
            g.cast(g.transpose(picked, 1, 2, 0, name="batch_seq_dim"), "int64", "float32", "float32"),
            g.const(inv_freq, "float32"),
            name="angles",
        )
        return (
            g.cast(g.op("Cos", angles, name="cos"), "float32", g.dtype, "cos_model"),
            g.cast(g.op("Sin", angles, name="sin"), "float32", g.dtype, "sin_model"),
        )


def _axis_of_frequency(config: LanguageConfig) -> npt.NDArray[np.int64]:
    """Which row of position_ids turns each frequency: int64 [dim / 2]."""
    half = (config.rotary_dim or config.head_dim) // 2
    sections = config.mrope_section or (half,)
    if not config.mrope_interleaved:
        return np.repeat(np.arange(len(sections)), sections)
    # time, height, width, time, .. as far as the sections of height and width go; the rest is time's
    axis_of = np.zeros(half, np.int64)
    for axis, section in enumerate(sections[1:], start=1):
        axis_of[axis : len(sections) * section : len(sections)] = axis
    return axis_of


def _lengths(g: GraphBuilder, past_len: Value, seq_len: Value) -> tuple[Value, Value]:
    """Int32 on the GPU [batch] and on the host [1]: each row's last column, and how long the longest row may be."""
    zero, one = g.const(0, "int64"), g.const(1, "int64")
    # seq_len lies on the host, and a sum with it would too: the last of a Range is seq_len - 1 on the GPU
    rows = g.op("Range", zero, g.op("Squeeze", seq_len, g.ints(0), name="seq_scalar"), one, name="rows")
    last = g.op("Add", g.inputs["write_index"], _last(g, rows, 0, "row"), name="last_column")
    # of a prompt its own length, of a step the cache's, since a captured step stays as it is
    is_step = g.op("Equal", seq_len, g.ints(1), name="is_step")
    longest = g.op("Where", is_step, past_len, seq_len, name="longest_row")
    return g.cast(last, "int64", "int32", "last_column_int32"), g.cast(longest, "int64", "int32", "longest_row_int32")


def _mask(
    g: GraphBuilder,
    kv_start: Value | None,
    write_index: Value | None,
    past_len: Value,
    context_len: Value,
    seq_len: Value,
) -> Value:
    """[batch, 1, seq, total], bool; portable: the bias that is added."""
    zero, one = g.const(0, "int64"), g.const(1, "int64")
    with g.scope("mask"):
        total = context_len if write_index is not None else g.op("Add", past_len, seq_len, name="total_len")
        scalars = [
            g.op("Squeeze", n, g.ints(0), name=f"{word}_scalar") for n, word in ((seq_len, "seq"), (total, "total"))
        ]
        rows = g.op("Range", zero, scalars[0], one, name="rows")
        columns = g.op("Range", zero, scalars[1], one, name="columns")
        start = past_len if write_index is None else g.unsqueeze(write_index, 1, name="write_index_rows")
        positions = g.op("Add", rows, start, name="positions")  # [seq], or [batch, seq] with a write_index
        axes = (0, 1, 3) if write_index is None else (1, 3)
        positions = g.unsqueeze(positions, *axes, name="position_grid")
        mask = g.op("LessOrEqual", columns, positions, name="not_later")
        if kv_start is not None:
            kv_start = g.unsqueeze(kv_start, 1, 2, 3, name="kv_start_grid")
            not_padding = g.op("GreaterOrEqual", columns, kv_start, name="not_padding")
            seen = g.op("And", mask, not_padding, name="causal")
            mask = g.op("Or", seen, g.op("Equal", columns, positions, name="itself"), name="seen")
        return mask if g.opset24 else mask_bias(g, mask)
