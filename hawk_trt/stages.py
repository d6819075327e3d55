"""The stage contract: every input and output of the three graphs, named, typed and shaped once.

The exporter declares graph inputs and outputs from here, the engine builder its optimization
profiles, the backends their bindings; tests and docs read the same tables.

    vision       pixel_values + the family's host plan           -> visual_embeds
    first_layer  merge, HAWK scores, top-k, gather, layer 0       -> hidden_states, kept_*, scores, KV of layer 0
    decoder      layers 1 .. , norm, lm_head on the last position -> logits, next_token, KV of its layers

A prefill and a decode step run the same graphs: a decode step has seq_len = num_kept_total = 1.

A hybrid model begins with linear attention, which has no scores. Its scoring layer L is its first layer of full
attention: first_layer runs layers 0 .. L-1 over all tokens, scores with layer L's norm, queries and keys, and runs
layer L on the kept tokens; the decoder runs layers L+1 and up. A linear layer has two states in place of keys and
values, both float32 and zeros before a prompt: past_conv, its convolution's last inputs, and past_state, a matrix a
head. Padding must not change them: a padded token's embedding is zeros, which the layers leave zeros.

With DeepStack the vision graph also gives deepstack_embeds, its features of several depths. first_layer adds the
first level behind layer 0, to the kept visual tokens, and hands the others to the decoder as deepstack_states.
"""

from dataclasses import dataclass
from typing import Literal

VISION = "vision"
FIRST_LAYER = "first_layer"
DECODER = "decoder"
STAGES = (VISION, FIRST_LAYER, DECODER)

# What runs a graph: ONNX Runtime's CPU provider, its CUDA provider, TensorRT, or an older version of any of them.
CPU, CUDA, TENSORRT, PORTABLE = "cpu", "cuda", "tensorrt", "portable"
TARGETS = (CPU, CUDA, TENSORRT, PORTABLE)

NORMALIZATIONS = ("l2", "softmax", "minmax")
DTYPES = ("float32", "float16", "bfloat16")

# A bias of this size or more decides alone: kept whatever the score, or never kept.
BIAS_KEEP = 3.0e38
BIAS_DROP = -3.0e38

# Kinds of layers, by Hugging Face's names.
FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"

# Of the target tensorrt, int64 [context_len], its values unread: attention reads as many columns of the cache.
CONTEXT_SLOTS, CONTEXT_LEN = "context_slots", "context_len"
# Columns of a cache that is written in place.
CACHE_LEN = "cache_len"

ElementType = Literal["model", "residual", "float32", "int64", "int32", "bool"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: of the tensor, the same in ONNX, plan and Python.
        element: its dtype; "model" is the bundle's, "residual" the dtype of the residual stream
            (float32 in a float16 bundle, else the bundle's).
        shape: integers, or the word of a dynamic dimension.
    """

    name: str
    element: ElementType
    shape: tuple[int | str, ...]

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


@dataclass(frozen=True, slots=True)
class LinearAttentionConfig:
    """Sizes of linear attention (a gated delta rule behind a causal convolution)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one row's past_conv and past_state, both float32."""
        conv = (self.conv_dim, self.conv_kernel - 1)
        return conv, (self.num_value_heads, self.key_head_dim, self.value_head_dim)


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Sizes of the language model, by Hugging Face's names.

    mrope_section is empty for plain 1-D RoPE. mrope_interleaved: the frequencies of time, height and width take
    turns instead of following each other. qk_norm: queries and keys are RMS-normed per head, before RoPE.
    deepstack_levels: visual features of so many vision layers are added behind language layers 0, 1, ..
    layer_types: of a hybrid model, a kind a layer; empty where all layers are full attention. linear: sizes of its
    linear layers. rotary_dim: so many numbers of a head are rotated, 0 for all. attention_gate: the output of full
    attention is multiplied by a sigmoid gate, which q_proj makes beside the queries. unit_offset_norms: RMS norms
    multiply by 1 + weight.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    mrope_interleaved: bool = False
    qk_norm: bool = False
    deepstack_levels: int = 0
    layer_types: tuple[str, ...] = ()
    linear: LinearAttentionConfig | None = None
    rotary_dim: int = 0
    attention_gate: bool = False
    unit_offset_norms: bool = False

    @property
    def position_axes(self) -> int:
        """Rows of position_ids: 3 (time, height, width) with mRoPE, else 1."""
        return len(self.mrope_section) or 1

    @property
    def scoring_layer(self) -> int:
        """The first layer of full attention: HAWK scores with its queries and keys."""
        return self.layer_types.index(FULL_ATTENTION) if self.layer_types else 0

    @property
    def first_layers(self) -> range:
        """Layers of the first_layer graph: the scoring layer and those before it."""
        return range(self.scoring_layer + 1)

    @property
    def decoder_layers(self) -> range:
        """Layers of the decoder graph."""
        return range(self.scoring_layer + 1, self.num_hidden_layers)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets whose runtime has operators for all layers."""
        return TARGETS if self.linear is None else (CPU, CUDA)

    def is_linear(self, layer: int) -> bool:
        """Whether a layer is linear attention."""
        return bool(self.layer_types) and self.layer_types[layer] == LINEAR_ATTENTION


def in_place(target: str) -> bool:
    """Whether a step writes the KV cache in place; a portable step returns a longer one."""
    return target != PORTABLE


def residual_dtype(model_dtype: str) -> str:
    """Dtype of the residual stream: float16 overflows in deep Qwen2.5-VL layers, so it gets float32."""
    return "float32" if model_dtype == "float16" else model_dtype


def key_name(layer: int, *, past: bool) -> str:
    """Name of a layer's key cache, as input (past) or output."""
    return f"{'past' if past else 'present'}_key.{layer}"


def value_name(layer: int, *, past: bool) -> str:
    """Name of a layer's value cache, as input (past) or output."""
    return f"{'past' if past else 'present'}_value.{layer}"


def conv_name(layer: int, *, past: bool) -> str:
    """Name of a linear layer's convolution state, as input (past) or output."""
    return f"{'past' if past else 'present'}_conv.{layer}"


def state_name(layer: int, *, past: bool) -> str:
    """Name of a linear layer's recurrent state, as input (past) or output."""
    return f"{'past' if past else 'present'}_state.{layer}"


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
    return _caches(config, layers, CACHE_LEN if in_place(target) else "total_len", past=False)


def _caches(config: LanguageConfig, layers: range, length: str, *, past: bool) -> tuple[TensorSpec, ...]:
    """What each layer remembers: two tensors, keys and values [.., length, ..] or the states of a linear layer."""
    specs: list[TensorSpec] = []
    for layer in layers:
        if config.linear is not None and config.is_linear(layer):
            conv, state = config.linear.state_shapes
            specs.append(TensorSpec(conv_name(layer, past=past), "float32", ("batch", *conv)))
            specs.append(TensorSpec(state_name(layer, past=past), "float32", ("batch", *state)))
        else:
            shape = ("batch", config.num_key_value_heads, length, config.head_dim)
            specs += [TensorSpec(name(layer, past=past), "model", shape) for name in (key_name, value_name)]
    return tuple(specs)
