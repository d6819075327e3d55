"""The stage contract: every input and output of first_layer and decoder, named, typed and shaped once.

Those of a vision graph lie beside the graph, in export/vision/. The bundle's manifest holds them all, by target.

With DeepStack the vision graph also gives deepstack_embeds, its features of several depths. first_layer adds the
first level behind layer 0, to the kept visual tokens, and hands the others to the decoder as deepstack_states.
"""

from dataclasses import dataclass
from typing import Literal

from hawk_trt.stages import (
    CACHE_LEN,
    CONTEXT_LEN,
    CONTEXT_SLOTS,
    CUDA,
    TENSORRT,
    LanguageConfig,
    in_place,
)

ElementType = Literal["model", "residual", "float32", "int64", "int32", "bool"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output."""

    name: str  # of the tensor, the same in ONNX, plan and Python
    # its dtype; "model" is the bundle's, "residual" the dtype of the residual stream (float32 in a float16 bundle, else
    # the bundle's)
    element: ElementType
    shape: tuple[int | str, ...]  # integers, or the word of a dynamic dimension

    def dtype(self, model_dtype: str) -> str:
        """Name of the dtype in a bundle of model_dtype."""
        if self.element == "model":
            return model_dtype
        if self.element == "residual":
            return residual_dtype(model_dtype)
        return self.element


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def residual_dtype(model_dtype: str) -> str:
    """Dtype of the residual stream: float16 overflows in deep Qwen2.5-VL layers, so it gets float32."""
    return "float32" if model_dtype == "float16" else model_dtype


def first_layer_spec(config: LanguageConfig, target: str) -> StageSpec:
    """The first_layer graph for a target.

    source_rows tells each position's embedding: r >= 0 is row r of visual_embeds, r < 0 is row -1 - r of text_embeds.
    Neither of the two is ever empty: where a batch has none, a row that nobody reads takes its place.
    """
    hidden, axes = config.hidden_size, config.position_axes
    inputs = (
        TensorSpec("text_embeds", "model", ("num_text", hidden)),
        TensorSpec("visual_embeds", "model", ("num_visual", hidden)),
        *deepstack_embeds_spec(config.deepstack_levels, hidden),
        TensorSpec("source_rows", "int64", ("batch", "seq_len")),
        TensorSpec("position_ids", "int64", (axes, "batch", "seq_len")),
        TensorSpec("query_weights", "float32", ("batch", "seq_len")),
        TensorSpec("select_bias", "float32", ("batch", "seq_len")),
        TensorSpec("head_weights", "float32", (config.num_attention_heads,)),
        TensorSpec("slots", "int64", ("num_kept_total",)),
        *_cache_inputs(config, target, config.first_layers),
    )
    outputs = (
        TensorSpec("hidden_states", "residual", ("batch", "num_kept_total", hidden)),
        TensorSpec("kept_indices", "int64", ("batch", "num_kept_total")),
        TensorSpec("kept_position_ids", "int64", (axes, "batch", "num_kept_total")),
        TensorSpec("scores", "float32", ("batch", "seq_len")),
        *_deepstack_states_spec(config),
        *_cache_outputs(config, target, config.first_layers),
    )
    return StageSpec(inputs, outputs)


def decoder_spec(config: LanguageConfig, target: str) -> StageSpec:
    """The decoder graph for a target: the layers behind the scoring layer."""
    inputs = (
        TensorSpec("hidden_states", "residual", ("batch", "num_kept_total", config.hidden_size)),
        TensorSpec("kept_position_ids", "int64", (config.position_axes, "batch", "num_kept_total")),
        *_deepstack_states_spec(config),
        *_cache_inputs(config, target, config.decoder_layers),
    )
    outputs = (
        TensorSpec("logits", "float32", ("batch", config.vocab_size)),
        TensorSpec("next_token", "int64", ("batch",)),
        *_cache_outputs(config, target, config.decoder_layers),
    )
    return StageSpec(inputs, outputs)


def deepstack_embeds_spec(levels: int, hidden: int) -> tuple[TensorSpec, ...]:
    """DeepStack's features of the visual tokens, from the vision graph to first_layer; nothing without levels."""
    return (TensorSpec("deepstack_embeds", "model", ("num_visual", levels, hidden)),) if levels else ()


def _deepstack_states_spec(config: LanguageConfig) -> tuple[TensorSpec, ...]:
    """What the decoder adds behind layers 1, 2, ..: DeepStack's features of the kept tokens, 0 for text."""
    shape = ("batch", "num_kept_total", config.deepstack_levels - 1, config.hidden_size)
    return (TensorSpec("deepstack_states", "model", shape),) if config.deepstack_levels > 1 else ()


def _cache_inputs(config: LanguageConfig, target: str, layers: range) -> tuple[TensorSpec, ...]:
    length = CACHE_LEN if in_place(target) else "past_len"
    write = (TensorSpec("write_index", "int64", ("batch",)),) if in_place(target) else ()
    slots = (TensorSpec(CONTEXT_SLOTS, "int64", (CONTEXT_LEN,)),) if target == TENSORRT else ()
    # without a mask ONNX Runtime's CUDA provider takes FlashAttention: a cuda cache has no padding in front
    start = () if target == CUDA else (TensorSpec("kv_start", "int64", ("batch",)),)
    return (*write, *start, *_caches(config, layers, length, past=True), *slots)


def _cache_outputs(config: LanguageConfig, target: str, layers: range) -> tuple[TensorSpec, ...]:
    return _caches(config, layers, CACHE_LEN if in_place(target) else "num_kept_total", past=False)


def _caches(config: LanguageConfig, layers: range, length: str, *, past: bool) -> tuple[TensorSpec, ...]:
    """What each layer remembers: two tensors, keys and values [.., length, ..] or the states of a linear layer."""
    specs: list[TensorSpec] = []
    for layer in layers:
        names = config.cache_names(layer, past=past)
        if config.linear is not None and config.is_linear(layer):
            shapes = zip(names, config.linear.state_shapes, strict=True)
            specs += [TensorSpec(name, "float32", ("batch", *shape)) for name, shape in shapes]
        else:
            columns = ("batch", config.num_key_value_heads, length, config.head_dim)
            specs += [TensorSpec(name, "model", columns) for name in names]
    return tuple(specs)
