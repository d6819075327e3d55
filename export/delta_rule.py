"""The gated delta rule in standard operators, a prompt in chunks, for runtimes without an operator of their own for it.

For one head, tokens t = 1, 2, .. and the state S [key_head_dim, value_head_dim]:

    S <- exp(g_t) S + beta_t k_t (v_t - exp(g_t) S^T k_t)^T                      o_t = S^T q_t / sqrt(key_head_dim)

In a chunk of up to 128 tokens, D_ij is the sum of g over j < t <= i, G_i that over t <= i, and S is before the chunk:

    A_ij = beta_i k_i . k_j exp(D_ij) for j < i          T = (I + A)^-1
    W = T (beta k exp(G))                                U = T (beta v)
    N = U - W S                                          S_i = exp(G_i) S + sum of exp(D_ij) k_j N_j over j <= i
    O = (q exp(G)) S + (q k^T exp(D), j <= i) N          S <- exp(G_last) S + (k exp(D_last))^T N

All chunks are computed at once, and so are the states before them. The last line is S <- P S + Q for each chunk, with
P = exp(G_last) I - (k exp(D_last))^T W and Q = (k exp(D_last))^T U. Two in a row are one: (P', Q') after (P, Q) is
(P' P, P' Q + Q'). So each chunk but the last takes in the one before it, then the two, the four .. before those. There
is no loop, since TensorRT captures none in a CUDA graph. A decode step is one chunk of one token: all that is empty.

It stays in float32. D is a sum of numbers of one sign, never a difference of two G, and never above 0. T is made of the
inverses of blocks of 1, 2, 4 .. tokens, whose numbers are T's own; those of powers of A can be far larger.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.stages import LINEAR_CHUNK, LINEAR_DOUBLINGS, LinearAttentionConfig

from .graph import END, GraphBuilder, Value


@dataclass(frozen=True, slots=True)
class Chunks:
    """How the tokens of a graph lie in chunks: values that all linear layers share."""

    seq: Value  # int64 [1], tokens
    grid: Value  # int64 [3], (batch, chunks, tokens of a chunk)
    pads: Value  # int64 [6], for Pad of [batch, seq, ..] to whole chunks
    lower: Value  # float32 [chunk, chunk], 1 where j <= i, for the row i and the column j
    before: Value  # the same where j < i
    # of blocks of 1, 2, 4, .. 64 tokens, 1 where i is in the second and j in the first of a pair of them
    blocks: tuple[Value, ...]
    others: Value  # int64 [1], chunks but the last


def chunks_of(g: GraphBuilder, batch_seq: Value) -> Chunks:
    """Lay out the tokens; batch_seq: int64 [2]."""
    row, column = np.arange(LINEAR_CHUNK)[:, None], np.arange(LINEAR_CHUNK)
    sizes = [2**power for power in range(LINEAR_CHUNK.bit_length() - 1)]
    with g.scope("chunks"):
        batch, seq = (g.cut(batch_seq, 0, index, index + 1, name=n) for index, n in enumerate(("batch", "seq")))
        width = g.op("Min", seq, g.ints(LINEAR_CHUNK), name="width")
        # not by the width, which may be 1: TensorRT would plan memory for as many chunks as tokens
        rounded_up = g.op("Add", seq, g.ints(LINEAR_CHUNK - 1), name="rounded_up")
        count = g.op("Div", rounded_up, g.ints(LINEAR_CHUNK), name="count")
        padding = g.op("Sub", g.op("Mul", count, width, name="padded"), seq, name="padding")
        corner = g.op("Concat", width, width, axis=0, name="corner")

        def square(values: npt.NDArray[np.bool_], name: str) -> Value:
            return g.op("Slice", _mask(g, values, f"{name}_of_all"), g.ints(0, 0), corner, g.ints(0, 1), name=name)

        return Chunks(
            seq=seq,
            grid=g.op("Concat", batch, count, width, axis=0, name="grid"),
            pads=g.op("Concat", g.ints(0, 0, 0, 0), padding, g.ints(0), axis=0, name="pads"),
            lower=square(column <= row, "lower"),
            before=square(column < row, "before"),
            blocks=tuple(
                square((row // size % 2 == 1) & (column // size == row // size - 1), f"blocks_{size}") for size in sizes
            ),
            others=g.op("Sub", count, g.ints(1), name="others"),
        )


def delta_rule(
    g: GraphBuilder,
    chunks: Chunks,
    sizes: LinearAttentionConfig,
    query: Value,
    key: Value,
    value: Value,
    state: Value,
    decay: Value,
    beta: Value,
) -> tuple[Value, Value]:
    """Run the rule over all tokens, in float32: [batch, seq, value heads * dim], and S behind the last token.

    query, key: [batch, seq, key heads * dim], of norm 1, each head for value_heads / key_heads value heads in a row.
    value: [batch, seq, value heads * dim].  state: [batch, value heads, key dim, value dim], S before the first token.
    decay: g, [batch, seq, value heads].  beta: as decay.
    """
    key_dim, value_dim, heads = sizes.key_head_dim, sizes.value_head_dim, sizes.num_value_heads

    def by_chunk(x: Value, count: int, dim: int, name: str) -> Value:
        """[batch, seq, count * dim] -> [batch, heads, chunks, chunk, dim]; what is padded is 0, and adds nothing."""
        shape = g.op("Concat", chunks.grid, g.ints(count, dim), axis=0, name=f"{name}_shape")
        x = g.op("Pad", x, chunks.pads, name=f"{name}_padded")
        x = g.op("Reshape", x, shape, allowzero=1, name=f"{name}_split")
        x = g.transpose(x, 0, 3, 1, 2, 4, name=f"{name}_by_chunk")
        if count == heads:
            return x
        x = g.op(
            "Expand",
            g.unsqueeze(x, 2, name=f"{name}_groups"),
            g.ints(1, 1, heads // count, 1, 1, 1),
            name=f"{name}_repeated",
        )
        shape = g.op(
            "Concat",
            g.cut(chunks.grid, 0, 0, 1, name="batch"),
            g.ints(heads),
            g.cut(chunks.grid, 0, 1, END, name="in_chunks"),
            g.ints(dim),
            axis=0,
            name=f"{name}_heads_shape",
        )
        return g.op("Reshape", x, shape, allowzero=1, name=f"{name}_by_head")

    query, key = (by_chunk(x, sizes.num_key_heads, key_dim, n) for x, n in ((query, "query"), (key, "key")))
    value = by_chunk(value, heads, value_dim, "value")
    step, beta = (by_chunk(x, heads, 1, n) for x, n in ((decay, "decay"), (beta, "beta")))  # [.., chunk, 1]

    between = g.op("MatMul", chunks.lower, g.op("Mul", step, chunks.before, name="steps"), name="D")
    between = g.op("Mul", g.op("Exp", between, name="exp_D"), chunks.lower, name="between")  # [.., chunk, chunk]
    since = g.op("Exp", g.op("MatMul", chunks.lower, step, name="G"), name="since_start")  # [.., chunk, 1]
    whole = g.cut(since, 3, -1, END, name="whole_chunk")  # [.., 1, 1]
    columns = g.transpose(key, 0, 1, 2, 4, 3, name="key_columns")
    until_end = g.op("Mul", columns, g.cut(between, 3, -1, END, name="until_end"), name="decayed_keys")

    written = g.op("Mul", key, beta, name="beta_key")
    inverse = _inverse(g, chunks, g.op("Mul", g.op("MatMul", written, columns, name="kk"), between, name="A"))
    written = g.op("Mul", written, since, name="beta_key_decayed")
    both = g.op("Concat", written, g.op("Mul", value, beta, name="beta_value"), axis=4, name="written")
    both = g.op("MatMul", inverse, both, name="W_U")
    of_state, own = g.ops("Split", both, g.ints(key_dim, value_dim), axis=4, count=2, name="split_W_U")

    before = _states(g, chunks, sizes, both, until_end, whole, state)
    new = g.op("Sub", own, g.op("MatMul", of_state, before, name="W_S"), name="N")
    query = g.op("Mul", query, g.const(key_dim**-0.5, "float32"), name="scaled_query")
    scores = g.op("Mul", g.op("MatMul", query, columns, name="qk"), between, name="scores")
    of_before = g.op("MatMul", g.op("Mul", query, since, name="query_decayed"), before, name="of_state")
    out = g.op("Add", of_before, g.op("MatMul", scores, new, name="of_chunk"), name="O")
    out = g.reshape(g.transpose(out, 0, 2, 3, 1, 4, name="by_token"), 0, -1, heads * value_dim, name="with_padding")
    out = g.op("Slice", out, g.ints(0), chunks.seq, g.ints(1), name="without_padding")

    def last(x: Value, name: str) -> Value:
        return g.cut(x, 2, -1, END, name=f"last_{name}")

    added = g.op("MatMul", last(until_end, "keys"), last(new, "N"), name="added_last")
    kept = g.op("Mul", last(before, "state"), last(whole, "decay"), name="kept_last")
    return out, g.op("Squeeze", g.op("Add", kept, added, name="S"), g.ints(2), name="S_last")


def _inverse(g: GraphBuilder, chunks: Chunks, a: Value) -> Value:
    """(I + A)^-1, of A below the diagonal: of two blocks T1 and T2 with B below T1 it is T1, T2 and -T2 B T1 there."""
    identity = g.op("Sub", chunks.lower, chunks.before, name="identity")
    inverse = g.op("Sub", identity, g.op("Mul", a, chunks.blocks[0], name="A_1"), name="T_2")
    for power, mask in enumerate(chunks.blocks[1:], start=1):
        size = 2**power
        below = g.op("MatMul", inverse, g.op("Mul", a, mask, name=f"A_{size}"), name=f"T_A_{size}")
        inverse = g.op("Sub", inverse, g.op("MatMul", below, inverse, name=f"T_A_T_{size}"), name=f"T_{2 * size}")
    return inverse


def _states(
    g: GraphBuilder,
    chunks: Chunks,
    sizes: LinearAttentionConfig,
    both: Value,
    keys: Value,
    whole: Value,
    state: Value,
) -> Value:
    """S before each chunk: [batch, heads, chunks, key dim, value dim].

    both: W and U side by side.  keys: decayed to the chunk's end, in columns.  whole: exp(G_last).  state: before all.
    """
    key_dim, value_dim = sizes.key_head_dim, sizes.value_head_dim

    def others(x: Value, name: str) -> Value:
        """Of all chunks but the last; told by its number, or TensorRT plans memory for far more."""
        return g.op("Slice", x, g.ints(0), chunks.others, g.ints(2), name=name)

    parts = ((both, "W_U"), (keys, "keys"), (whole, "decays"))
    both, keys, whole = (others(x, f"{name}_of_others") for x, name in parts)
    both = g.op("Mul", both, g.const([-1] * key_dim + [1] * value_dim, "float32"), name="minus_W_U")
    kept = g.op("Mul", whole, _mask(g, np.eye(key_dim, key_dim + value_dim, dtype=bool), "identity"), name="decayed")
    steps = g.op("Add", kept, g.op("MatMul", keys, both, name="K_W_U"), name="P_Q")
    of_q = g.const(np.arange(key_dim + value_dim) >= key_dim, "float32")
    for doubling in range(LINEAR_DOUBLINGS):
        shift = 2**doubling
        with g.scope(f"after_{shift}"):
            first, later = g.cut(steps, 2, 0, -shift, name="first"), g.cut(steps, 2, shift, END, name="later")
            product = g.op("MatMul", g.cut(later, 4, 0, key_dim, name="P"), first, name="P_P_Q")
            joined = g.op("Add", product, g.op("Mul", later, of_q, name="Q"), name="joined")
            alone = g.cut(steps, 2, 0, shift, name="alone")
            steps = others(g.op("Concat", alone, joined, axis=2, name="all"), "P_Q")
    p, q = g.ops("Split", steps, g.ints(key_dim, value_dim), axis=4, count=2, name="split_P_Q")
    after = g.op("MatMul", g.reshape(p, 0, 0, -1, key_dim, name="P_rows"), state, name="P_S")
    after = g.op("Add", g.reshape(after, 0, 0, -1, key_dim, value_dim, name="P_S_by_chunk"), q, name="states_after")
    return g.op("Concat", g.unsqueeze(state, 2, name="first_state"), after, axis=2, name="states_before")


def _mask(g: GraphBuilder, values: npt.NDArray[np.bool_], name: str) -> Value:
    """1 and 0 in float32, stored as bool: a graph's constants are small."""
    return g.cast(g.const(values, "bool"), "bool", "float32", name)
