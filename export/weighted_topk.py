"""hawk::WeightedTopK as an ONNX function: the rule in standard ops, for runtimes without the plugin.

    s    = where(visual and finite, head_scores, 0), normalised per head over the row's visual tokens
    score= sum_i head_weights_i s_i                               float32
    key  = bias where |bias| >= 3e38, else score + bias
    kept = the K = len(slots) largest keys, the lower index on a tie, ascending

The node carries plugin_version and plugin_namespace, so that TensorRT takes the plugin of that name
where it is loaded. Names inside are prefixed: TensorRT 10.3's parser mixes up inner and outer ones.
"""

import onnx.parser

from hawk_trt.stages import BIAS_DROP, BIAS_KEEP

from .graph import HAWK_DOMAIN, GraphBuilder, Value, opset

NAME = "WeightedTopK"
INPUTS = ("head_scores", "head_weights", "visual_rows", "select_bias", "slots")
OUTPUTS = ("kept_indices", "scores")

# head_scores: (batch, heads, seq_len); head_weights: (heads); visual_rows, select_bias: (batch, seq_len).
_RULE = """
    axis_0 = Constant <value = int64[1] {{0}}> ()
    axis_1 = Constant <value = int64[1] {{1}}> ()
    axis_last = Constant <value = int64[1] {{-1}}> ()
    zero_row = Constant <value = int64 {{0}}> ()
    zero = Constant <value = float {{0.0}}> ()
    keep = Constant <value = float {{{keep}}}> ()
    drop = Constant <value = float {{{drop}}}> ()
    visual = GreaterOrEqual (visual_rows, zero_row)
    visual_heads = Unsqueeze (visual, axis_1)
    is_nan = IsNaN (head_scores)
    is_inf = IsInf (head_scores)
    not_finite = Or (is_nan, is_inf)
    finite = Not (not_finite)
    usable = And (visual_heads, finite)
    s = Where (usable, head_scores, zero)
    {normalise}
    weight_row = Unsqueeze (head_weights, axis_0)
    weighted_sum = MatMul (weight_row, normal)
    sum_by_token = Squeeze (weighted_sum, axis_1)
    scores = Where (visual, sum_by_token, zero)
    bias_size = Abs (select_bias)
    decided = GreaterOrEqual (bias_size, keep)
    biased = Add (scores, select_bias)
    key = Where (decided, select_bias, biased)
    num_kept_total = Shape (slots)
    best_keys, best = TopK <axis = -1, largest = 1, sorted = 1> (key, num_kept_total)
    best_int32 = Cast <to = 6> (best)
    kept_indices, order = TopK <axis = -1, largest = 0, sorted = 1> (best_int32, num_kept_total)
"""

# What is not visual is 0 in s, and 0 in normal too.
_NORMALISE = {
    "l2": """
    epsilon = Constant <value = float {1e-12}> ()
    norm = ReduceL2 <keepdims = 1> (s, axis_last)
    bounded = Max (norm, epsilon)
    normal = Div (s, bounded)
""",
    # the total is at least exp(0) = 1 wherever there is a visual token, so the bound only acts on rows without any
    "softmax": """
    epsilon = Constant <value = float {1e-30}> ()
    visual_only = Where (visual_heads, s, drop)
    max = ReduceMax <keepdims = 1> (visual_only, axis_last)
    shifted = Sub (visual_only, max)
    exp = Exp (shifted)
    powers = Where (visual_heads, exp, zero)
    total = ReduceSum <keepdims = 1> (powers, axis_last)
    bounded = Max (total, epsilon)
    normal = Div (powers, bounded)
""",
    "minmax": """
    epsilon = Constant <value = float {1.1920929e-7}> ()
    for_max = Where (visual_heads, s, drop)
    for_min = Where (visual_heads, s, keep)
    max = ReduceMax <keepdims = 1> (for_max, axis_last)
    min = ReduceMin <keepdims = 1> (for_min, axis_last)
    span = Sub (max, min)
    bounded = Max (span, epsilon)
    above_min = Sub (s, min)
    scaled = Div (above_min, bounded)
    normal = Where (visual_heads, scaled, zero)
""",
}


def weighted_topk(g: GraphBuilder, normalization: str, *inputs: Value) -> tuple[Value, Value]:
    """Add the node and its function.

    normalization: "l2", "softmax" or "minmax".  inputs: INPUTS, in their order.

    Returns:
        kept_indices (batch, num_kept_total) int32, ascending, and scores (batch, seq_len) float32.
    """
    g.functions.append(build_function(g.target, normalization))
    kept, scores = g.ops(
        NAME,
        *inputs,
        name=NAME,
        count=2,
        domain=HAWK_DOMAIN,
        normalization=normalization,
        plugin_version="1",
        plugin_namespace="",
    )
    g.declare(kept, "int32", "batch", "num_kept_total")
    return kept, scores


def build_function(target: str, normalization: str) -> onnx.FunctionProto:
    """The function of a normalization over a target's opset."""
    rule = _RULE.format(keep=BIAS_KEEP, drop=BIAS_DROP, normalise=_NORMALISE[normalization])
    attributes = {"normalization": normalization, "plugin_version": "1", "plugin_namespace": ""}
    told = ", ".join(f'{name}: string = "{value}"' for name, value in attributes.items())
    text = (
        f'<opset_import: ["": {opset(target)}], domain: "{HAWK_DOMAIN}"> '
        f"{NAME} <{told}> ({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)}) {{{rule}}}"
    )
    function: onnx.FunctionProto = onnx.parser.parse_function(text)
    for part in (function, *function.node):
        part.input[:] = [f"{NAME}/{name}" for name in part.input]
        part.output[:] = [f"{NAME}/{name}" for name in part.output]
    for node in function.node:
        node.name = node.output[0]
        node.ClearField("domain")  # which the parser sets, though it is empty
    return function
