"""The stage contract: every input and output of first_layer and decoder, named, typed and shaped once.

Those of a vision graph lie beside the graph, in export/vision/. The bundle's manifest holds them all, by target.

With DeepStack the vision graph also gives deepstack_embeds, its features of several depths. first_layer adds the
first level behind layer 0, to the kept visual tokens, and hands the others to the decoder as deepstack_states.
"""

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.stages import (
    CACHE_LEN,
    CONTEXT_LEN,
    CONTEXT_SLOTS,
    CUDA,
    DECODER,
    FIRST_LAYER,
    TENSORRT,
    LanguageConfig,
    in_place,
)

Tensors = tuple[TensorEntry, ...]


def graph_entry(stage: str, target: str, inputs: Tensors, outputs: Tensors) -> GraphEntry:
    """What the manifest says of a graph, whose file is named by stage and target."""
    return GraphEntry(stage, target, f"{stage}.{target}.onnx", inputs, outputs)


def residual_dtype(model_dtype: str) -> str:
    """Dtype of the residual stream: float16 overflows in deep Qwen2.5-VL layers, so it gets float32."""
    return "float32" if model_dtype == "float16" else model_dtype


def first_layer_entry(config: LanguageConfig, dtype: str, target: str) -> GraphEntry:
    """The first_layer graph of a model in a dtype, for a target.

    source_rows tells each position's embedding: r >= 0 is row r of visual_embeds, r < 0 is row -1 - r of text_embeds.
    Neither of the two is ever empty: where a batch has none, a row that nobody reads takes its place.
    """
    hidden, axes = config.hidden_size, config.position_axes
    inputs = (
        TensorEntry("text_embeds", dtype, ("num_text", hidden)),
        TensorEntry("visual_embeds", dtype, ("num_visual", hidden)),
        *deepstack_embeds(config.deepstack_levels, hidden, dtype),
        TensorEntry("source_rows", "int64", ("batch", "seq_len")),
        TensorEntry("position_ids", "int64", (axes, "batch", "seq_len")),
        TensorEntry("query_weights", "float32", ("batch", "seq_len")),
        TensorEntry("select_bias", "float32", ("batch", "seq_len")),
        TensorEntry("head_weights", "float32", (config.num_attention_heads,)),
        TensorEntry("slots", "int64", ("num_kept_total",)),
        *_cache_inputs(config, dtype, target, config.first_layers),
    )
    outputs = (
        TensorEntry("hidden_states", residual_dtype(dtype), ("batch", "num_kept_total", hidden)),
        TensorEntry("kept_indices", "int64", ("batch", "num_kept_total")),
        TensorEntry("kept_position_ids", "int64", (axes, "batch", "num_kept_total")),
        TensorEntry("scores", "float32", ("batch", "seq_len")),
        *_deepstack_states(config, dtype),
        *_cache_outputs(config, dtype, target, config.first_layers),
    )
    return graph_entry(FIRST_LAYER, target, inputs, outputs)


def decoder_entry(config: LanguageConfig, dtype: str, target: str) -> GraphEntry:
    """The decoder graph of a model in a dtype, for a target: the layers behind the scoring layer."""
    inputs = (
        TensorEntry("hidden_states", residual_dtype(dtype), ("batch", "num_kept_total", config.hidden_size)),
        TensorEntry("kept_position_ids", "int64", (config.position_axes, "batch", "num_kept_total")),
        *_deepstack_states(config, dtype),
        *_cache_inputs(config, dtype, target, config.decoder_layers),
    )
    outputs = (
        TensorEntry("logits", "float32", ("batch", config.vocab_size)),
        TensorEntry("next_token", "int64", ("batch",)),
        *_cache_outputs(config, dtype, target, config.decoder_layers),
    )
    return graph_entry(DECODER, target, inputs, outputs)


def deepstack_embeds(levels: int, hidden: int, dtype: str) -> Tensors:
    """DeepStack's features of the visual tokens, from the vision graph to first_layer; nothing without levels."""
    return (TensorEntry("deepstack_embeds", dtype, ("num_visual", levels, hidden)),) if levels else ()


def _deepstack_states(config: LanguageConfig, dtype: str) -> Tensors:
    """What the decoder adds behind layers 1, 2, ..: DeepStack's features of the kept tokens, 0 for text."""
    shape = ("batch", "num_kept_total", config.deepstack_levels - 1, config.hidden_size)
    return (TensorEntry("deepstack_states", dtype, shape),) if config.deepstack_levels > 1 else ()


def _cache_inputs(config: LanguageConfig, dtype: str, target: str, layers: range) -> Tensors:
    length = CACHE_LEN if in_place(target) else "past_len"
    write = (TensorEntry("write_index", "int64", ("batch",)),) if in_place(target) else ()
    slots = (TensorEntry(CONTEXT_SLOTS, "int64", (CONTEXT_LEN,)),) if target == TENSORRT else ()
    # without a mask ONNX Runtime's CUDA provider takes FlashAttention: a cuda cache has no padding in front
    start = () if target == CUDA else (TensorEntry("kv_start", "int64", ("batch",)),)
    return (*write, *start, *_caches(config, dtype, layers, length, past=True), *slots)


def _cache_outputs(config: LanguageConfig, dtype: str, target: str, layers: range) -> Tensors:
    return _caches(config, dtype, layers, CACHE_LEN if in_place(target) else "num_kept_total", past=False)


def _caches(config: LanguageConfig, dtype: str, layers: range, length: str, *, past: bool) -> Tensors:
    """What each layer remembers: two tensors, keys and values [.., length, ..] or the states of a linear layer."""
    specs: list[TensorEntry] = []
    for layer in layers:
        names = config.cache_names(layer, past=past)
        if config.linear is not None and config.is_linear(layer):
            shapes = zip(names, config.linear.state_shapes, strict=True)
            specs += [TensorEntry(name, "float32", ("batch", *shape)) for name, shape in shapes]
        else:
            columns = ("batch", config.num_key_value_heads, length, config.head_dim)
            specs += [TensorEntry(name, dtype, columns) for name in names]
    return tuple(specs)
