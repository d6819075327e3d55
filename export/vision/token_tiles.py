"""Token-wise parts of a vision tower in tiles of tokens: their inner values never exist for all patches at once.

A 12.8-megapixel image has 65,536 patches: one inner value of the 7B's gated MLP would take 0.9 GB, its queries, keys
and values together 1.0 GB, and tensors of many sizes leave holes in the runtime's memory. Inside a Scan over tiles of
at most TILE tokens they are small, and what is left outside has the size of the residual stream. The engine builder
puts the parts back without the loop: TensorRT plans its memory itself.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..graph import GraphBuilder
from ..layers import linear

TILE = 4096
SCOPE = "token_tiles"


class TokenTiles:
    """How all parts of a graph cut their tokens: equal tiles, the last one filled up with zeros."""

    def __init__(self, g: GraphBuilder, tokens: ir.Value) -> None:
        """Compute the shapes. tokens: their number, int64 [1]."""
        self._g = g
        self._tokens = tokens
        with g.scope(SCOPE):
            count = self._divide_up(self._tokens, g.ints(TILE), "count")
            length = self._divide_up(self._tokens, count, "length")
            missing = g.op("Sub", g.op("Mul", count, length, name="padded"), self._tokens, name="missing")
            self._pads = g.op("Concat", g.ints(0, 0), missing, g.ints(0), axis=0, name="pads")
            self._shape = g.op("Concat", count, length, g.ints(-1), axis=0, name="shape")

    def run(
        self, x: ir.Value, part: Callable[[ir.Value], Sequence[ir.Value]], widths: Sequence[int]
    ) -> Sequence[ir.Value]:
        """Run a part over the tiles.

        Args:
            x: [tokens, features], in the model's dtype.
            part: adds the nodes of one tile, [tile tokens, features], and returns its outputs, each
                [tile tokens, width]; rows must not depend on each other.
            widths: of the outputs.

        Returns:
            the outputs of all tokens, each [tokens, width].
        """
        g = self._g
        with g.scope("tiles"):
            padded = g.op("Pad", x, self._pads, name="padded")
            tiles = g.op("Reshape", padded, self._shape, name="cut")
        body = g.subgraph(part)
        with g.scope("tiles"):
            done = g.ops("Scan", tiles, body=body, num_scan_inputs=1, name="Scan", count=len(widths))
            joined = [g.reshape(value, -1, width, name="joined") for value, width in zip(done, widths, strict=True)]
            return [g.op("Slice", value, g.ints(0), self._tokens, g.ints(0), name="output") for value in joined]

    def _divide_up(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        g = self._g
        more = g.op("Sub", g.op("Add", a, b, name=f"{name}_sum"), g.ints(1), name=f"{name}_rounded")
        return g.op("Div", more, b, name=name)


def query_key_value(g: GraphBuilder, tiles: TokenTiles, x: ir.Value, weight: str, dim: int) -> Sequence[ir.Value]:
    """The joined projection cut in three: [tokens, dim] -> queries, keys and values, each [tokens, dim]."""

    def project(tile: ir.Value) -> Sequence[ir.Value]:
        return g.ops("Split", linear(g, tile, weight, "qkv"), axis=1, num_outputs=3, count=3, name="split_qkv")

    return tiles.run(x, project, [dim] * 3)
