"""Rows in tiles for the target cpu, so that their inner values never exist for all rows at once.

A 12.8-megapixel image has 65,536 patches. One inner value of the 7B's gated MLP would take 0.9 GB, its queries, keys
and values together 1.0 GB, and the scores of one attention head 17 GB. Inside a Scan over tiles these are small, and
what is left outside has the size of the residual stream. CUDA and TensorRT have attention that never stores the
scores, and no use for loops: the other targets run all rows at once.
"""

from collections.abc import Callable, Sequence

from hawk_trt.stages import CPU, PORTABLE

from ..graph import GraphBuilder, Value
from ..layers import attention, weighted_values

TOKENS = 4096
# Queries of one tile. Over 65,536 keys and 16 heads, 96 take 0.4 GB of scores; 128 is 5 % faster there.
QUERIES = 96
_QUERY_AXIS = 2


class Tiles:
    """How all parts of a graph cut their rows: equal tiles, the last one filled up with zeros."""

    def __init__(self, g: GraphBuilder, source: Value, source_axis: int, most: int, axis: int = 0) -> None:
        """Compute the shapes.

        source: a tensor with as many rows, along source_axis.  most: rows of one tile.  axis: of the rows, the last but
        one.
        """
        self._g, self._axis = g, axis
        if g.target != CPU:
            return
        with g.scope("tiles"):
            rows = self._rows = g.op("Shape", source, start=source_axis, end=source_axis + 1, name="rows")
            count = self._divide_up(rows, g.ints(most), "count")
            length = self._divide_up(rows, count, "length")
            missing = g.op("Sub", g.op("Mul", count, length, name="padded"), rows, name="missing")
            rank = axis + 2
            self._pads = g.op("Concat", g.ints(*[0] * (rank + axis)), missing, g.ints(0), axis=0, name="pads")
            lead = [g.ints(*[0] * axis)] if axis else []
            self._shape = g.op("Concat", *lead, count, length, g.ints(-1), axis=0, name="shape")

    def run(self, x: Value, part: Callable[[Value], Sequence[Value]], widths: Sequence[int]) -> Sequence[Value]:
        """Run a part over the tiles: its outputs of all rows, each [.., rows, width].

        x: [.., rows, features], in the model's dtype.  part: adds the nodes of one tile, [.., tile rows, features], and
        returns its outputs, each [.., tile rows, width]; rows must not depend on each other.  widths: of the outputs.
        """
        g, axis = self._g, self._axis
        if g.target != CPU:
            return part(x)
        with g.scope("tiles"):
            padded = g.op("Pad", x, self._pads, name="padded")
            tiles = g.op("Reshape", padded, self._shape, name="cut")
        body = g.subgraph(part)
        with g.scope("tiles"):
            done = g.ops(
                "Scan",
                tiles,
                body=body,
                num_scan_inputs=1,
                scan_input_axes=[axis],
                scan_output_axes=[axis] * len(widths),
                name="Scan",
                count=len(widths),
            )
            joined = [
                g.reshape(value, *[0] * axis, -1, width, name="joined")
                for value, width in zip(done, widths, strict=True)
            ]
            return [g.op("Slice", value, g.ints(0), self._rows, g.ints(axis), name="output") for value in joined]

    def _divide_up(self, a: Value, b: Value, name: str) -> Value:
        g = self._g
        more = g.op("Sub", g.op("Add", a, b, name=f"{name}_sum"), g.ints(1), name=f"{name}_rounded")
        return g.op("Div", more, b, name=name)


def token_tiles(g: GraphBuilder, x: Value) -> Tiles:
    """Tiles of tokens, for the token-wise parts. x: [tokens, features]."""
    return Tiles(g, x, 0, TOKENS)


def query_tiles(g: GraphBuilder, pixels: Value) -> Tiles:
    """Tiles of queries [frames, heads, patches, head_dim]. pixels: [frames, patches, patch_dim]."""
    return Tiles(g, pixels, 1, QUERIES, _QUERY_AXIS)


def frame_attention(g: GraphBuilder, tiles: Tiles, parts: Sequence[Value], heads: int, head_dim: int) -> Value:
    """Attention over whole frames: [frames, heads, patches, head_dim].

    For the target cpu in tiles of queries, for portable one head after the other, so that the scores of one are all
    that an old runtime without fused attention must hold.  parts: queries, keys and values, each in that shape.
    """
    query, key, value = parts
    scale = float(head_dim**-0.5)
    if g.target == CPU:
        scaled = g.op("Mul", query, g.scalar(scale), name="scale_q")
        columns = g.transpose(key, 0, 1, 3, 2, name="k_transposed")
        return tiles.run(scaled, lambda tile: [weighted_values(g, tile, columns, value)], [head_dim])[0]
    if g.target == PORTABLE and heads > 1:
        by_head = [
            g.ops("Split", part, axis=1, num_outputs=heads, count=heads, name=f"{letter}_by_head")
            for part, letter in zip(parts, "qkv", strict=True)
        ]
        outs = [attention(g, q, k, v, scale) for q, k, v in zip(*by_head, strict=True)]
        return g.op("Concat", *outs, axis=1, name="all_heads")
    return attention(g, query, key, value, scale)
