"""The first_layer graph: merge, HAWK scores, top-k, gather, layer 0 on the kept tokens.

A hybrid model has linear layers before its first layer L of full attention. They run over all tokens, and L takes the
place of layer 0 in what follows.

Scores are float32 whatever the model's dtype, in absorbed form. With r(n) = 1 / rms(x_n), the norm's weight
g and the query weights a_t (1/T at the T query tokens, so that sum_t is a mean):

    m    = g * sum_t a_t r(t) x_t                       mean of the normed query tokens
    q_i  = Wq_i m + bq_i
    u_i  = g * (Wk_g^T q_i)                             the key projection absorbed into the query
    s_i(n) = (r(n) x_n . u_i + bk_g . q_i) / sqrt(head_dim)

which equals mean_t q_i(t) . k_g(n) / sqrt(head_dim) without projecting a single dropped token. A model that norms
its queries and keys leaves no such shortcut: there h = r x g of every token is projected, normed, then averaged.
"""

from hawk_trt.stages import LanguageConfig

from .attention import attention_context, decoder_layer
from .graph import GraphBuilder, Value
from .layers import add_residual, inverse_rms, offset_scale
from .linear_attention import linear_context, linear_layer
from .weighted_topk import weighted_topk


def first_layer(g: GraphBuilder, config: LanguageConfig, normalization: str) -> dict[str, Value]:
    """Add the nodes of the first_layer graph."""
    embeds = _merge(g, g.inputs["text_embeds"], g.inputs["visual_embeds"], g.inputs["source_rows"])
    before: dict[str, Value] = {}
    if config.scoring_layer:
        embeds, before = _linear_layers(g, config, embeds)
    with g.scope("hawk"):
        score = _normed_head_scores if config.qk_norm else _head_scores
        head_scores = score(g, config, embeds, g.inputs["query_weights"])
        kept, scores = weighted_topk(
            g,
            normalization,
            head_scores,
            g.inputs["head_weights"],
            g.inputs["source_rows"],
            g.inputs["select_bias"],
            g.inputs["slots"],
        )
    with g.scope("gather"):
        indices = g.cast(kept, "int32", "int64", "kept_indices")
        index_vectors = g.unsqueeze(indices, 2, name="index_vectors")
        hidden = g.op("GatherND", embeds, index_vectors, batch_dims=1, name="kept_embeds")
        by_token = g.transpose(g.inputs["position_ids"], 1, 2, 0, name="positions_by_token")
        positions = g.op("GatherND", by_token, index_vectors, batch_dims=1, name="kept_positions")
        positions = g.transpose(positions, 2, 0, 1, name="kept_position_ids")
        if not config.scoring_layer:
            hidden = g.cast(hidden, g.dtype, g.residual, "to_residual")
    context = attention_context(g, config, positions, hidden, config.scoring_layer)
    x = g.reshape(hidden, -1, config.hidden_size, name="flat_embeds")
    x, present = decoder_layer(g, config, context, x, config.scoring_layer)
    outputs: dict[str, Value] = {}
    if config.deepstack_levels:
        with g.scope("deepstack"):
            first, outputs = _kept_levels(g, config, index_vectors)
            x = add_residual(g, x, g.reshape(first, -1, config.hidden_size, name="flat_level"), "add_level")
    hidden_shape = g.op("Shape", hidden, name="hidden_shape")
    return {
        "hidden_states": g.op("Reshape", x, hidden_shape, name="hidden_states"),
        "kept_indices": indices,
        "kept_position_ids": positions,
        "scores": scores,
        **before,
        **present,
        **outputs,
    }


def _merge(g: GraphBuilder, text_embeds: Value, visual_embeds: Value, source_rows: Value) -> Value:
    """Each position's row of either table: [batch, seq_len, hidden]."""
    zero = g.const(0, "int64")
    with g.scope("merge"):
        is_visual = g.op("GreaterOrEqual", source_rows, zero, name="is_visual")
        visual_row = g.op("Max", source_rows, zero, name="visual_row")
        text_row = g.op("Max", g.op("Sub", g.const(-1, "int64"), source_rows, name="mirrored"), zero, name="text_row")
        visual = g.op("Gather", visual_embeds, visual_row, axis=0, name="visual_by_token")
        text = g.op("Gather", text_embeds, text_row, axis=0, name="text_by_token")
        return g.op("Where", g.unsqueeze(is_visual, 2, name="is_visual_row"), visual, text, name="inputs_embeds")


def _linear_layers(g: GraphBuilder, config: LanguageConfig, embeds: Value) -> tuple[Value, dict[str, Value]]:
    """The layers before the scoring layer, over all tokens: [batch, seq_len, hidden], residual dtype; and states."""
    context = linear_context(g, embeds, "all_batch_seq")
    x = g.reshape(g.cast(embeds, g.dtype, g.residual, "to_residual"), -1, config.hidden_size, name="all_embeds")
    states: dict[str, Value] = {}
    for layer in range(config.scoring_layer):
        x, present = linear_layer(g, config, context, x, layer)
        states |= present
    shape = g.op("Concat", context.batch_seq, g.ints(config.hidden_size), axis=0, name="all_hidden_shape")
    return g.op("Reshape", x, shape, name="all_hidden_states"), states


def _kept_levels(g: GraphBuilder, config: LanguageConfig, index_vectors: Value) -> tuple[Value, dict[str, Value]]:
    """DeepStack's features of the kept tokens, 0 where one is text.

    Returns:
        The level behind layer 0, [batch, num_kept_total, 1, hidden], and the later ones as an output, if there are.
    """
    zero = g.const(0, "int64")
    rows = g.op("GatherND", g.inputs["source_rows"], index_vectors, batch_dims=1, name="kept_rows")
    visual = g.unsqueeze(g.op("GreaterOrEqual", rows, zero, name="is_visual"), 2, 3, name="is_visual_row")
    levels = g.op("Gather", g.inputs["deepstack_embeds"], g.op("Max", rows, zero, name="row"), axis=0, name="by_token")
    levels = g.op("Where", visual, levels, g.scalar(0.0), name="levels")  # [batch, num_kept_total, levels, hidden]
    later = config.deepstack_levels - 1
    if not later:
        return levels, {}
    first, rest = g.ops("Split", levels, g.ints(1, later), axis=2, count=2, name="split_levels")
    return first, {"deepstack_states": rest}


def _normed_head_scores(g: GraphBuilder, config: LanguageConfig, embeds: Value, query_weights: Value) -> Value:
    """Raw scores of every position where queries and keys are normed per head: (batch, heads, seq_len) float32."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, layer = config.hidden_size, _scoring_layer(config)
    batch_seq = g.op("Shape", embeds, start=0, end=2, name="batch_seq")

    def float32(name: str, label: str, *shape: int) -> Value:
        return g.cast(g.weight(f"{layer}.{name}.weight", *shape), g.dtype, "float32", label)

    def norm_scale(name: str, label: str, size: int) -> Value:
        if config.unit_offset_norms:
            return offset_scale(g, g.weight(f"{layer}.{name}.weight", size))
        return float32(name, label, size)

    def normed(x: Value, letter: str, count: int) -> Value:
        """Projected and normed per head: [batch, seq_len, count, dim]."""
        flat = g.reshape(x, -1, hidden, name=f"{letter}_rows")
        gated = letter == "q" and config.attention_gate
        rows = 2 * count * dim if gated else count * dim
        weight = float32(f"self_attn.{letter}_proj", f"{letter}_float32", rows, hidden)
        if gated:
            halves = g.reshape(weight, count, 2, dim, hidden, name="query_and_gate_rows")
            weight = g.op("Gather", halves, g.const(0, "int64"), axis=1, name="query_rows_by_head")
            weight = g.reshape(weight, count * dim, hidden, name="query_proj")
        scale = norm_scale(f"self_attn.{letter}_norm", f"{letter}_scale", dim)
        shape = g.op("Concat", batch_seq, g.ints(count, dim), axis=0, name=f"{letter}_shape")
        with g.scope(f"{letter}_norm"):
            split = g.op("Reshape", g.op("Gemm", flat, weight, transB=1, name="project"), shape, name="heads")
            normal = g.op("Mul", split, inverse_rms(g, split, config.rms_norm_eps), name="normalize")
            return g.op("Mul", normal, scale, name="scale")

    x = g.cast(embeds, g.residual if config.scoring_layer else g.dtype, "float32", "embeds_float32")
    scale = norm_scale("input_layernorm", "norm_float32", hidden)
    with g.scope("input_layernorm"):
        h = g.op("Mul", g.op("Mul", x, inverse_rms(g, x, config.rms_norm_eps), name="normalize"), scale, name="scale")
    # Where, since 0 x NaN of one bad visual token would otherwise poison the query
    asked = g.op("Greater", query_weights, g.const(0.0, "float32"), name="is_query")
    queried = g.op("Where", g.unsqueeze(asked, 2, name="is_query_row"), h, g.const(0.0, "float32"), name="queried")
    query = g.reshape(normed(queried, "q", heads), 0, -1, heads * dim, name="query_rows")
    mean = g.op("MatMul", g.unsqueeze(query_weights, 1, name="weight_row"), query, name="query_mean")
    grouped = g.reshape(mean, 0, kv_heads, heads // kv_heads, dim, name="query_groups")
    key = g.transpose(normed(h, "k", kv_heads), 0, 2, 3, 1, name="key_columns")  # [batch, kv_heads, dim, seq_len]
    scores = g.op("MatMul", grouped, key, name="token_scores")  # [batch, kv_heads, group, seq_len]
    seq_len = g.cut(batch_seq, 0, 1, 2, name="seq_len")
    shape = g.op("Concat", g.ints(0, heads), seq_len, axis=0, name="scores_shape")
    scores = g.op("Reshape", scores, shape, name="scores_by_head")
    return g.op("Mul", scores, g.const(dim**-0.5, "float32"), name="head_scores")


def _head_scores(g: GraphBuilder, config: LanguageConfig, embeds: Value, query_weights: Value) -> Value:
    """Raw scores of every position: (batch, heads, seq_len) float32."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, layer = config.hidden_size, _scoring_layer(config)

    def float32(name: str, *shape: int) -> Value:
        return g.cast(g.weight(f"{layer}.{name}", *shape), g.dtype, "float32", f"{name}_float32")

    x = g.cast(embeds, g.dtype, "float32", "embeds_float32")
    inverse = inverse_rms(g, x, config.rms_norm_eps)  # [batch, seq_len, 1]
    scale = float32("input_layernorm.weight", hidden)
    # Where, since 0 x NaN of one bad visual token would otherwise poison the query
    weights = g.unsqueeze(query_weights, 2, name="query_weight_columns")
    asked = g.op("Greater", weights, g.const(0.0, "float32"), name="is_query")
    queried = g.op("Where", asked, x, g.const(0.0, "float32"), name="query_embeds")
    factor = g.op(
        "Where", asked, g.op("Mul", weights, inverse, name="weight_x_rms"), g.const(0.0, "float32"), name="a_r"
    )
    factor = g.transpose(factor, 0, 2, 1, name="a_r_row")
    mean = g.op("Mul", g.op("MatMul", factor, queried, name="weighted_mean"), scale, name="query_mean")
    mean = g.reshape(mean, -1, hidden, name="query_mean_rows")  # [batch, hidden]
    q_proj = float32("self_attn.q_proj.weight", heads * dim, hidden)
    q_bias = float32("self_attn.q_proj.bias", heads * dim)
    query = g.op("Gemm", mean, q_proj, q_bias, transB=1, name="query_projection")  # Wq m + bq
    grouped = g.reshape(query, -1, kv_heads, heads // kv_heads, dim, name="query_groups")
    key = float32("self_attn.k_proj.weight", kv_heads * dim, hidden)
    key = g.reshape(key, kv_heads, dim, hidden, name="k_proj_groups")
    absorbed = g.op("MatMul", grouped, key, name="absorb_k_proj")  # [batch, kv_heads, group, hidden]
    absorbed = g.reshape(absorbed, -1, heads, hidden, name="absorbed_heads")
    absorbed = g.op("Mul", absorbed, scale, name="absorb_norm")
    absorbed = g.transpose(absorbed, 0, 2, 1, name="absorbed_columns")  # [batch, hidden, heads]
    products = g.op("MatMul", x, absorbed, name="token_scores")  # [batch, seq_len, heads]
    scores = g.op("Mul", products, inverse, name="normed_scores")
    bias = g.reshape(float32("self_attn.k_proj.bias", kv_heads * dim), kv_heads, dim, 1, name="k_bias_groups")
    constant = g.op("MatMul", grouped, bias, name="query_dot_k_bias")
    scores = g.op("Add", scores, g.reshape(constant, -1, 1, heads, name="k_bias_scores"), name="add_k_bias")
    scores = g.op("Mul", scores, g.const(dim**-0.5, "float32"), name="scaled_scores")
    return g.transpose(scores, 0, 2, 1, name="head_scores")


def _scoring_layer(config: LanguageConfig) -> str:
    """What the names of its tensors begin with."""
    return f"language_model.layers.{config.scoring_layer}"
