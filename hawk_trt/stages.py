"""Stages and targets by name, the sizes of the language model, and what its layers remember.

    vision       pixel_values + the family's host plan           -> visual_embeds
    first_layer  merge, HAWK scores, top-k, gather, layer 0       -> hidden_states, kept_*, scores, KV of layer 0
    decoder      layers 1 .. , norm, lm_head on the last position -> logits, next_token, KV of its layers

A prefill and a decode step run the same graphs: a decode step has seq_len = num_kept_total = 1. The exporter names
every input and output in export/contract.py and writes them into the manifest, which all others read.

A hybrid model begins with linear attention, which has no scores. Its scoring layer L is its first layer of full
attention: first_layer runs layers 0 .. L-1 over all tokens, scores with layer L's norm, queries and keys, and runs
layer L on the kept tokens; the decoder runs layers L+1 and up. A linear layer has two states in place of keys and
values, both float32 and zeros before a prompt: past_conv, its convolution's last inputs, and past_state, a matrix a
head. Padding must not change them: a padded token's embedding is zeros, which the layers leave zeros.
"""

from dataclasses import dataclass

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

# Linear attention in standard operators, for tensorrt and portable: tokens of a chunk, how often a chunk takes in what
# is before it, each time twice as many, and the tokens of the longest prompt. The last chunk is not taken in.
LINEAR_CHUNK, LINEAR_DOUBLINGS = 128, 7
MAX_LINEAR_TOKENS = LINEAR_CHUNK * (2**LINEAR_DOUBLINGS + 1)

# Kinds of layers, by Hugging Face's names.
FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"

# Of the target tensorrt, int64 [context_len], its values unread: attention reads as many columns of the cache.
CONTEXT_SLOTS, CONTEXT_LEN = "context_slots", "context_len"
# Columns of a cache that is written in place.
CACHE_LEN = "cache_len"


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
        return range(self.scoring_layer + 1, self.num_hidden_layers)

    @property
    def num_linear_layers(self) -> int:
        return self.layer_types.count(LINEAR_ATTENTION)

    def is_linear(self, layer: int) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == LINEAR_ATTENTION

    def cache_names(self, layer: int, *, past: bool) -> tuple[str, str]:
        """Names of a layer's keys and values, or of its two states, as inputs (past) or outputs."""
        time, kinds = "past" if past else "present", ("conv", "state") if self.is_linear(layer) else ("key", "value")
        return f"{time}_{kinds[0]}.{layer}", f"{time}_{kinds[1]}.{layer}"


def in_place(target: str) -> bool:
    """Whether a step writes the KV cache in place; a portable step returns its new columns alone."""
    return target != PORTABLE
