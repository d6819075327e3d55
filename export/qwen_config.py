"""The config.json of the Qwen line: Qwen2-VL, Qwen2.5-VL, and the dense Qwen3-VL and Qwen3.5, of any size."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from hawk_trt.models.vision_config import AnyVision, Qwen2Vision, Qwen3Vision, Qwen25Vision, Qwen35Vision
from hawk_trt.stages import FULL_ATTENTION, LINEAR_ATTENTION, LanguageConfig, LinearAttentionConfig

from .config import (
    ModelConfig,
    Section,
    is_integer,
    language_config,
    rope_section,
    special_tokens,
    text_section,
    vision_section,
)

Config: TypeAlias = Mapping[str, Any]

# How the tokenizer spells the tokens around and in place of images and videos.
_SPELLINGS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# The released config.json files of Qwen2-VL leave out most of these, and transformers 4.49 leaves out of one of
# Qwen2.5-VL that it saves what equals its own defaults: which then hold.
_DEFAULTS_2 = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_DEFAULTS_2_5 = {
    "depth": 32,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size"),
)
_VISION_ROPE_THETA = 10000.0
# Of LinearAttentionConfig, as config.json calls them behind linear_.
_LINEAR_SIZES = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")


def _qwen2_vision(config: Config) -> Qwen2Vision:
    """config.json calls the tower's width embed_dim and the language model's hidden_size."""
    vision = vision_section(config, _DEFAULTS_2)
    width = vision.integer("embed_dim")
    named = {
        "hidden_size": width,
        "out_hidden_size": vision.get("hidden_size"),
        "intermediate_size": int(width * vision.number("mlp_ratio")),
    }
    return Qwen2Vision(**_vision_sizes(config, Section({**vision.values, **named}, "vision_config"), "quick_gelu"))


def _qwen2_5_vision(config: Config) -> Qwen25Vision:
    vision = vision_section(config, _DEFAULTS_2_5)
    sizes = Qwen25Vision(
        **_vision_sizes(config, vision, "silu"),
        tokens_per_second=vision.number("tokens_per_second"),
        window_size=vision.integer("window_size"),
        fullatt_block_indexes=_block_numbers(vision, "fullatt_block_indexes"),
    )
    if not sizes.window_side:
        raise vision.wrong("window_size", "at least patch_size * spatial_merge_size")
    return sizes


def _qwen3_vision(config: Config, kind: type[Qwen3Vision] = Qwen3Vision) -> Qwen3Vision:
    vision = vision_section(config)
    blocks, places = _block_numbers(vision, "deepstack_visual_indexes"), vision.integer("num_position_embeddings")
    if list(blocks) != sorted(set(blocks)):
        raise vision.wrong("deepstack_visual_indexes", "ascending block numbers")
    if math.isqrt(places) ** 2 != places:
        raise vision.wrong("num_position_embeddings", "the square of an integer")
    sizes = _vision_sizes(config, vision, "gelu_pytorch_tanh")
    return kind(**sizes, num_position_embeddings=places, deepstack_visual_indexes=blocks)


def _qwen3_language(config: Config) -> LanguageConfig:
    """Queries and keys are normed, mRoPE's axes take turns, DeepStack adds."""
    text = text_section(config)
    rope_section(text).expect("mrope_interleaved", True, True)
    language = language_config(config, qk_norm=True)
    levels = len(_block_numbers(vision_section(config), "deepstack_visual_indexes"))
    if levels >= language.num_hidden_layers:
        raise text.wrong("num_hidden_layers", f"more than the {levels} of deepstack_visual_indexes")
    return replace(language, mrope_interleaved=True, deepstack_levels=levels)


def _qwen3_5_vision(config: Config) -> Qwen3Vision:
    """Qwen3-VL's tower, without DeepStack."""
    vision = vision_section(config, {"deepstack_visual_indexes": []})
    vision.expect("deepstack_visual_indexes", [])
    return _qwen3_vision({**config, "vision_config": vision.values}, Qwen35Vision)


def _qwen3_5_language(config: Config) -> LanguageConfig:
    """Linear layers, and full ones with a gate, of whose heads a part is rotated."""
    text = text_section(config)
    rope_section(text).expect("mrope_interleaved", True, True)
    text.expect("attn_output_gate", True, True)
    language = language_config(config, qk_norm=True, hybrid=True)
    sizes = LinearAttentionConfig(*(text.integer(f"linear_{name}") for name in _LINEAR_SIZES))
    if sizes.num_value_heads % sizes.num_key_heads:
        raise text.wrong("linear_num_value_heads", f"a multiple of linear_num_key_heads {sizes.num_key_heads}")
    if sizes.conv_kernel < 2:
        raise text.wrong("linear_conv_kernel_dim", "at least 2")
    return replace(
        language,
        mrope_interleaved=True,
        layer_types=_layer_types(text, language.num_hidden_layers),
        linear=sizes,
        attention_gate=True,
        unit_offset_norms=True,
    )


def _layer_types(text: Section, layers: int) -> tuple[str, ...]:
    """The kind of each layer: two at least of full attention, the first to score with and one behind it."""
    kinds, every = text.get("layer_types"), text.get("full_attention_interval", 4)
    if kinds is None and is_integer(every) and every > 0:
        kinds = [LINEAR_ATTENTION if (layer + 1) % every else FULL_ATTENTION for layer in range(layers)]
    known = isinstance(kinds, list | tuple) and all(kind in (FULL_ATTENTION, LINEAR_ATTENTION) for kind in kinds)
    if not known or len(kinds) != layers or list(kinds).count(FULL_ATTENTION) < 2:
        expected = (
            f"{FULL_ATTENTION} or {LINEAR_ATTENTION} for each of {layers} layers, two of {FULL_ATTENTION} at least"
        )
        raise text.wrong("layer_types", expected)
    return tuple(kinds)


_SIDES: dict[str, tuple[Callable[[Config], LanguageConfig], Callable[[Config], AnyVision]]] = {
    "qwen2_vl": (language_config, _qwen2_vision),
    "qwen2_5_vl": (language_config, _qwen2_5_vision),
    "qwen3_vl": (_qwen3_language, _qwen3_vision),
    "qwen3_5": (_qwen3_5_language, _qwen3_5_vision),
}


def read(family: str, config: Config, generation: Config, added_tokens: Mapping[str, int]) -> ModelConfig:
    """The model of a config.json of the family; see architectures.read_config."""
    language, vision = _SIDES[family]
    tokens = special_tokens(config, generation, added_tokens, _SPELLINGS)
    return ModelConfig(language(config), vision(config), tokens)


def _vision_sizes(config: Config, vision: Section, hidden_act: str) -> dict[str, Any]:
    """The fields of Qwen2Vision; hidden_act is the only activation that the family's graph computes."""
    vision.expect("hidden_act", hidden_act)
    sizes: dict[str, Any] = {key: vision.integer(key) for key in _SIZES}
    for channels in ("in_channels", "in_chans"):
        vision.expect(channels, 3, 3)
    # Every patch rotates half of each head by its row and half by its column, in pairs.
    if sizes["hidden_size"] % (4 * sizes["num_heads"]):
        raise vision.wrong("num_heads", f"a divisor of hidden_size / 4 = {sizes['hidden_size']}/4")
    text_hidden_size = text_section(config).integer("hidden_size")
    if sizes["out_hidden_size"] != text_hidden_size:
        raise vision.wrong("out_hidden_size", f"the text's hidden_size {text_hidden_size}")
    rope = Section(vision.get("rope_parameters") or {}, "vision_config.rope_parameters")
    rope.expect("rope_type", "axial", "axial")
    theta = rope.number("rope_theta") if "rope_theta" in rope.values else _VISION_ROPE_THETA
    return {**sizes, "in_channels": 3, "rope_theta": theta}


def _block_numbers(vision: Section, key: str) -> tuple[int, ...]:
    blocks, depth = vision.get(key), vision.integer("depth")
    if not isinstance(blocks, list | tuple) or not all(is_integer(block) and 0 <= block < depth for block in blocks):
        raise vision.wrong(key, f"a list of block numbers below depth {depth}")
    return tuple(blocks)
