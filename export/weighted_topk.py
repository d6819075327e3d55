"""hawk::WeightedTopK as an ONNX function: the rule in standard ops, for runtimes without the plugin.

    s    = where(visual and finite, head_scores, 0), normalised per head over the row's visual tokens
    score= sum_i head_weights_i s_i                               float32
    key  = bias where |bias| >= 3e38, else score + bias
    kept = the K = len(slots) largest keys, the lower index on a tie, ascending

The node carries plugin_version and plugin_namespace, so that TensorRT takes the plugin of that name
where it is loaded. Names inside are prefixed: TensorRT 10.3's parser mixes up inner and outer ones.
"""

import numpy as np
import onnx_ir as ir

from hawk_trt.stages import BIAS_KEEP

from .function_body import FunctionBody
from .graph import HAWK_DOMAIN, GraphBuilder, opset

NAME = "WeightedTopK"
INPUTS = ("head_scores", "head_weights", "visual_rows", "select_bias", "slots")
OUTPUTS = ("kept_indices", "scores")
_L2_EPSILON = 1e-12
_MINMAX_EPSILON = float(np.finfo(np.float32).eps)


def weighted_topk(
    g: GraphBuilder,
    normalization: str,
    head_scores: ir.Value,
    head_weights: ir.Value,
    visual_rows: ir.Value,
    select_bias: ir.Value,
    slots: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Add the node and its function.

    Args:
        g: the graph.
        normalization: "l2", "softmax" or "minmax".
        head_scores: (batch, heads, seq_len) float32, raw score of each position.
        head_weights: (heads) float32.
        visual_rows: (batch, seq_len) int64, below 0 where a position is not visual.
        select_bias: (batch, seq_len) float32.
        slots: (num_kept_total) int64, its values unread.

    Returns:
        kept_indices (batch, num_kept_total) int32, ascending, and scores (batch, seq_len) float32.
    """
    g.functions.append(build_function(g.target, normalization))
    kept, scores = g.ops(
        NAME,
        head_scores,
        head_weights,
        visual_rows,
        select_bias,
        slots,
        name=NAME,
        count=2,
        domain=HAWK_DOMAIN,
        normalization=normalization,
        plugin_version="1",
        plugin_namespace="",
    )
    kept.type, scores.type = ir.TensorType(ir.DataType.INT32), ir.TensorType(ir.DataType.FLOAT)
    kept.shape = ir.Shape(("batch", "num_kept_total"))
    return kept, scores


def build_function(target: str, normalization: str) -> ir.Function:
    """The function body of a normalization, over the target's opset."""
    inputs = [ir.Value(name=f"{NAME}/{name}") for name in INPUTS]
    body = FunctionBody(NAME)
    head_scores, head_weights, visual_rows, select_bias, slots = inputs
    visual = body.op("GreaterOrEqual", visual_rows, body.const(0, np.int64), name="visual")
    visual_heads = body.op("Unsqueeze", visual, body.const([1], np.int64), name="visual_heads")
    bad = body.op(
        "Or",
        body.op("IsNaN", head_scores, name="is_nan"),
        body.op("IsInf", head_scores, name="is_inf"),
        name="not_finite",
    )
    usable = body.op("And", visual_heads, body.op("Not", bad, name="finite"), name="usable")
    zero = body.const(0.0, np.float32)
    raw = body.op("Where", usable, head_scores, zero, name="raw_scores")
    normal = {"l2": _l2, "softmax": _softmax, "minmax": _minmax}[normalization](body, raw, visual_heads, zero)
    row = body.op("Unsqueeze", head_weights, body.const([0], np.int64), name="weight_row")
    scores = body.op("MatMul", row, normal, name="weighted_sum")  # [batch, 1, seq_len]
    scores = body.op("Squeeze", scores, body.const([1], np.int64), name="squeezed_scores")
    scores = body.op("Where", visual, scores, zero, name="visual_scores")
    decided = body.op(
        "GreaterOrEqual",
        body.op("Abs", select_bias, name="bias_size"),
        body.const(BIAS_KEEP, np.float32),
        name="decided",
    )
    key = body.op("Where", decided, select_bias, body.op("Add", scores, select_bias, name="biased"), name="key")
    count = body.op("Shape", slots, name="num_kept_total")
    _, best = body.ops("TopK", key, count, axis=-1, largest=1, sorted=1, name="best", count=2)
    best = body.op("Cast", best, to=ir.DataType.INT32, name="best_int32")
    ascending, _ = body.ops("TopK", best, count, axis=-1, largest=0, sorted=1, name="ascending", count=2)
    ascending.name, scores.name = (f"{NAME}/{name}" for name in OUTPUTS)
    graph = ir.Graph(inputs, [ascending, scores], nodes=body.nodes, opset_imports={"": opset(target)}, name=NAME)
    attribute = ir.Attr("normalization", ir.AttributeType.STRING, normalization)
    version = ir.Attr("plugin_version", ir.AttributeType.STRING, "1")
    namespace = ir.Attr("plugin_namespace", ir.AttributeType.STRING, "")
    return ir.Function(HAWK_DOMAIN, NAME, graph=graph, attributes=[attribute, version, namespace])


def _l2(body: FunctionBody, raw: ir.Value, visual: ir.Value, zero: ir.Value) -> ir.Value:
    """S / max(||s||_2, 1e-12); masked positions are 0 and stay so."""
    del visual, zero
    norm = body.op("ReduceL2", raw, body.const([-1], np.int64), keepdims=1, name="l2")
    return body.op(
        "Div", raw, body.op("Max", norm, body.const(_L2_EPSILON, np.float32), name="l2_bounded"), name="normal"
    )


def _softmax(body: FunctionBody, raw: ir.Value, visual: ir.Value, zero: ir.Value) -> ir.Value:
    """exp(s - max) / sum over the visual tokens; 0 elsewhere, and everywhere without any."""
    axis = body.const([-1], np.int64)
    masked = body.op("Where", visual, raw, body.const(-BIAS_KEEP, np.float32), name="visual_only")
    shifted = body.op("Sub", masked, body.op("ReduceMax", masked, axis, keepdims=1, name="max"), name="shifted")
    powers = body.op("Where", visual, body.op("Exp", shifted, name="exp"), zero, name="powers")
    total = body.op("ReduceSum", powers, axis, keepdims=1, name="total")
    # at least exp(0) = 1 wherever there is a visual token, so the bound only acts on rows without any
    bounded = body.op("Max", total, body.const(1e-30, np.float32), name="total_bounded")
    return body.op("Div", powers, bounded, name="normal")


def _minmax(body: FunctionBody, raw: ir.Value, visual: ir.Value, zero: ir.Value) -> ir.Value:
    """(s - min) / max(max - min, eps) over the visual tokens; 0 elsewhere."""
    axis = body.const([-1], np.int64)
    high = body.op("Where", visual, raw, body.const(-BIAS_KEEP, np.float32), name="for_max")
    low = body.op("Where", visual, raw, body.const(BIAS_KEEP, np.float32), name="for_min")
    top = body.op("ReduceMax", high, axis, keepdims=1, name="max")
    bottom = body.op("ReduceMin", low, axis, keepdims=1, name="min")
    span = body.op(
        "Max",
        body.op("Sub", top, bottom, name="span"),
        body.const(_MINMAX_EPSILON, np.float32),
        name="span_bounded",
    )
    scaled = body.op("Div", body.op("Sub", raw, bottom, name="above_min"), span, name="scaled")
    return body.op("Where", visual, scaled, zero, name="normal")
