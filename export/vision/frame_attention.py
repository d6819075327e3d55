"""hawk::FrameAttention: softmax(q k^T) v over whole frames, in tiles of queries.

A frame of a 12.8-megapixel image has 65,536 patches: its scores would take 17 GB a head at once. The function's
body runs over tiles of queries in a Scan, so that memory grows with the patches and not with their square. The
engine builder puts TensorRT's own attention in its place, which never stores the scores.
"""

import numpy as np
import onnx_ir as ir

from hawk_trt.stages import INPLACE, PORTABLE

from ..function_body import FunctionBody
from ..graph import HAWK_DOMAIN, OPSETS, GraphBuilder

NAME = "FrameAttention"
# Queries of one tile. Over 65,536 keys and 16 heads, 96 take 0.4 GB of scores and 64 0.27 GB; 128 is 5 % faster there,
# 64 is 6 to 9 % slower, but portable graphs rotate in several ops, whose values leave less of 8 GB.
TILE = {INPLACE: 96, PORTABLE: 64}
_SEQ_AXIS = 2


def frame_attention(g: GraphBuilder, query: ir.Value, key: ir.Value, value: ir.Value, heads: int) -> ir.Value:
    """Add the node, and the function once a graph.

    Args:
        g: the graph.
        query: [frames, heads, patches, head_dim], already scaled.
        key: the same shape.
        value: the same shape.
        heads: number of heads.

    Returns:
        [frames, heads, patches, head_dim].
    """
    if all(function.name != NAME for function in g.functions):
        g.functions.append(build_function(g.profile, heads))
    out = g.op(NAME, query, key, value, name=NAME, domain=HAWK_DOMAIN)
    out.type = ir.TensorType(g.element_type)
    return out


def build_function(profile: str, heads: int) -> ir.Function:
    """The function body over the profile's opset."""
    inputs = [ir.Value(name=f"{NAME}/{name}") for name in ("query", "key", "value")]
    query, key, value = inputs
    body = FunctionBody(NAME)
    length = TILE[profile]
    zero, tile = body.const([0], np.int64), body.const([length], np.int64)
    patches = body.op("Shape", query, start=_SEQ_AXIS, end=_SEQ_AXIS + 1, name="num_patches")
    missing = body.op("Mod", body.op("Neg", patches, name="minus_patches"), tile, name="missing")
    ends = body.op("Concat", body.const([0] * 6, np.int64), missing, zero, axis=0, name="pad_ends")
    padded = body.op("Pad", query, ends, name="padded")
    # [frames, heads, tiles, length, head_dim]
    cut = body.op("Concat", body.const([0, heads, -1, length], np.int64), _head_dim(body, query), axis=0, name="cut")
    tiles = body.op("Reshape", padded, cut, name="tiles")
    columns = body.op("Transpose", key, perm=[0, 1, 3, 2], name="key_columns")
    done = body.op(
        "Scan",
        tiles,
        body=_tile_graph(profile, columns, value),
        num_scan_inputs=1,
        scan_input_axes=[_SEQ_AXIS],
        scan_output_axes=[_SEQ_AXIS],
        name="scan",
    )
    joined = body.op(
        "Concat", body.const([0, heads, -1], np.int64), _head_dim(body, query), axis=0, name="joined_shape"
    )
    rows = body.op("Reshape", done, joined, name="joined")
    out = body.op("Slice", rows, zero, patches, body.const([_SEQ_AXIS], np.int64), name="output")
    graph = ir.Graph(inputs, [out], nodes=body.nodes, opset_imports={"": OPSETS[profile]}, name=NAME)
    return ir.Function(HAWK_DOMAIN, NAME, graph=graph, attributes=[])


def _head_dim(body: FunctionBody, query: ir.Value) -> ir.Value:
    return body.op("Shape", query, start=_SEQ_AXIS + 1, end=_SEQ_AXIS + 2, name=f"head_dim_{len(body.nodes)}")


def _tile_graph(profile: str, key_columns: ir.Value, value: ir.Value) -> ir.Graph:
    """Attention of one tile of queries; keys and values come from outside."""
    tile = ir.Value(name=f"{NAME}/tile/query")
    body = FunctionBody(f"{NAME}/tile")
    scores = body.op("MatMul", tile, key_columns, name="scores")
    weights = body.op("Softmax", scores, axis=-1, name="softmax")
    out = body.op("MatMul", weights, value, name="output")
    return ir.Graph([tile], [out], nodes=body.nodes, opset_imports={"": OPSETS[profile]}, name=f"{NAME}/tile")
