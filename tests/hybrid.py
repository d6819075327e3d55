"""Sizes of small language models, with and without linear layers."""

from dataclasses import replace

from hawk_trt.stages import LanguageConfig, LinearAttentionConfig

PLAIN = LanguageConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=50,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(2, 3, 3),
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
HYBRID = replace(
    PLAIN,
    num_hidden_layers=5,
    layer_types=("linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"),
    linear=LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6, conv_kernel=4),
)
