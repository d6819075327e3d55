"""The config.json of a Qwen vision-language checkpoint: sizes of both halves, and its special tokens.

Three generations of the file are read: the hub's (text sizes at the top level, rope_scaling, in_chans),
transformers 4.52's (at the top level and in text_config) and 5's (text_config with rope_parameters).
text_config wins where it holds a key. What the graphs cannot compute is refused here, by the name of its key.
"""

from collections.abc import Mapping
from typing import Any

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError
from hawk_trt.models.settings import expect, integer, is_integer, number, wrong
from hawk_trt.models.vision_config import Qwen25Vision
from hawk_trt.stages import LanguageConfig

# How the tokenizer spells the tokens around and in place of images and videos.
SPELLINGS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
_VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
)
_VISION_ROPE_THETA = 10000.0
# transformers 4.49 leaves out of a config.json that it saves what equals its own defaults.
_WINDOWED_VISION_DEFAULTS = {
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


def language_config(config: Mapping[str, Any], *, mrope: bool = True, own_head_dim: bool = False) -> LanguageConfig:
    """Sizes of the language model from config.json.

    Args:
        config: config.json.
        mrope: whether positions have time, height and width; else plain 1-D ones.
        own_head_dim: whether config.json says the size of a head; else it is hidden_size / num_attention_heads.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    text = text_settings(config)
    _refuse_quantized(text)
    _refuse_sliding_window(text)
    expect("hidden_act", text.get("hidden_act"), "silu")
    hidden_size = integer(text, "hidden_size")
    heads = integer(text, "num_attention_heads")
    kv_heads = integer(text, "num_key_value_heads")
    if hidden_size % heads and not own_head_dim:
        raise wrong("num_attention_heads", heads, f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    head_dim = integer(text, "head_dim") if own_head_dim else hidden_size // heads
    if text.get("head_dim") not in (None, head_dim):
        raise wrong("head_dim", text["head_dim"], f"hidden_size / num_attention_heads = {head_dim}")
    rope_theta, mrope_section = _rope(text, head_dim) if mrope else (_plain_rope(text), ())
    return LanguageConfig(
        hidden_size=hidden_size,
        intermediate_size=integer(text, "intermediate_size"),
        num_hidden_layers=integer(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=integer(text, "vocab_size"),
        rms_norm_eps=number(text, "rms_norm_eps"),
        rope_theta=rope_theta,
        mrope_section=mrope_section,
        max_position_embeddings=integer(text, "max_position_embeddings"),
        # Either place counts: 4.x wrote it at the top or in text_config, 5 at the top.
        tie_word_embeddings=bool(config.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings")),
    )


def windowed_vision_config(config: Mapping[str, Any]) -> Qwen25Vision:
    """Sizes of Qwen2.5-VL's vision tower.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    vision, where = _WINDOWED_VISION_DEFAULTS | dict(vision_section(config)), "vision_config."
    sizes = Qwen25Vision(
        **vision_sizes(config, vision, "silu"),
        tokens_per_second=number(vision, "tokens_per_second", where),
        window_size=integer(vision, "window_size", where),
        fullatt_block_indexes=block_numbers(vision, "fullatt_block_indexes"),
    )
    if sizes.window_size < sizes.token_side:
        raise wrong(f"{where}window_size", sizes.window_size, "at least patch_size * spatial_merge_size")
    return sizes


def vision_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision_config of config.json.

    Raises:
        CheckpointError: there is none.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise wrong("vision_config", vision, "the sizes of the vision tower")
    return vision


def vision_sizes(config: Mapping[str, Any], vision: Mapping[str, Any], hidden_act: str) -> dict[str, Any]:
    """Sizes that all Qwen vision towers have, by Hugging Face's names.

    Args:
        config: config.json.
        vision: its vision_config.
        hidden_act: the only activation that the family's graph computes.

    Returns:
        depth, hidden_size, intermediate_size, num_heads, in_channels, patch_size, temporal_patch_size,
        spatial_merge_size, out_hidden_size: int; rope_theta (of the 2-D rotary embedding): float.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    where = "vision_config."
    expect(f"{where}hidden_act", vision.get("hidden_act"), hidden_act)
    sizes: dict[str, Any] = {key: integer(vision, key, where) for key in _VISION_SIZES}
    sizes["in_channels"] = integer(vision, "in_channels" if "in_channels" in vision else "in_chans", where)

    # Every patch rotates half of each head by its row and half by its column, in pairs.
    if sizes["hidden_size"] % (4 * sizes["num_heads"]):
        raise wrong(f"{where}num_heads", sizes["num_heads"], f"a divisor of hidden_size / 4 = {sizes['hidden_size']}/4")
    if sizes["in_channels"] != 3:
        raise wrong(f"{where}in_channels", sizes["in_channels"], "3 (RGB)")
    text_hidden_size = integer(text_settings(config), "hidden_size")
    if sizes["out_hidden_size"] != text_hidden_size:
        raise wrong(f"{where}out_hidden_size", sizes["out_hidden_size"], f"the text's hidden_size {text_hidden_size}")

    rope = vision.get("rope_parameters") or {}
    expect(f"{where}rope_parameters.rope_type", rope.get("rope_type", "axial"), "axial")
    sizes["rope_theta"] = float(rope.get("rope_theta", _VISION_ROPE_THETA))
    return sizes


def block_numbers(vision: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Block numbers of the vision tower.

    Raises:
        CheckpointError: it is missing, or holds something else.
    """
    blocks, depth = vision.get(key), integer(vision, "depth", "vision_config.")
    if not isinstance(blocks, list | tuple) or not all(is_integer(b) and 0 <= b < depth for b in blocks):
        raise wrong(f"vision_config.{key}", blocks, f"a list of block numbers below depth {depth}")
    return tuple(blocks)


def special_tokens(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    added_tokens: Mapping[str, int],
    spellings: Mapping[str, str] = SPELLINGS,
) -> SpecialTokens:
    """Ids of the tokens that the runtime must know, None or empty where the checkpoint names none.

    Args:
        config: config.json.
        generation: generation_config.json, empty where there is none.
        added_tokens: content to id of the tokenizer's added tokens, empty without a tokenizer.
        spellings: of the tokens that config.json names no id for.

    Raises:
        CheckpointError: an id that is not a token of the vocabulary.
    """
    text = config.get("text_config") or {}
    vocab_size = integer(text_settings(config), "vocab_size")

    def checked(key: str, value: object) -> int:
        if not is_integer(value) or not 0 <= value < vocab_size:
            raise wrong(key, value, f"a token id below vocab_size {vocab_size}")
        return value

    def first(key: str, content: str, *sources: Mapping[str, Any]) -> int | None:
        found = [source[key] for source in sources if source.get(key) is not None]
        value = found[0] if found else added_tokens.get(content)
        return None if value is None else checked(key, value)

    found = [source.get("eos_token_id") for source in (generation, config, text)]
    eos = [token for value in found if value is not None for token in (value if isinstance(value, list) else [value])]
    return SpecialTokens(
        image=first("image_token_id", spellings["image"], config, text),
        video=first("video_token_id", spellings["video"], config, text),
        vision_start=first("vision_start_token_id", spellings["vision_start"], config, text),
        vision_end=first("vision_end_token_id", spellings["vision_end"], config, text),
        im_start=first("im_start_token_id", "<|im_start|>", config, text),
        im_end=first("im_end_token_id", "<|im_end|>", config, text),
        pad=first("pad_token_id", "<|endoftext|>", generation, config, text),
        eos=tuple(dict.fromkeys(checked("eos_token_id", token) for token in eos)),
    )


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top level of config.json, overridden by what text_config sets."""
    text = config.get("text_config") or {}
    return {**config, **{key: value for key, value in text.items() if value is not None}}


def _rope(text: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[int, ...]]:
    """rope_theta and mrope_section, from rope_parameters (5.x) or rope_scaling (before)."""
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = text.get(key) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise wrong(f"{key}.rope_type", rope_type, "default or mrope (remove the scaling to use the trained context)")
    theta = number(rope if "rope_theta" in rope else text, "rope_theta")
    section = rope.get("mrope_section")
    expected = f"three numbers of frequencies that add up to head_dim / 2 = {head_dim / 2:g}"
    if not isinstance(section, list | tuple) or len(section) != 3 or not all(is_integer(n) and n >= 0 for n in section):
        raise wrong(f"{key}.mrope_section", section, expected)
    if 2 * sum(section) != head_dim:
        raise wrong(f"{key}.mrope_section", section, expected)
    return theta, tuple(section)


def _plain_rope(text: Mapping[str, Any]) -> float:
    """rope_theta of 1-D positions; dynamic scaling begins beyond max_position_embeddings, where no prompt gets."""
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = text.get(key) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "dynamic"):
        raise wrong(f"{key}.rope_type", rope_type, "default or dynamic (remove the scaling to use the trained context)")
    return number(rope if "rope_theta" in rope else text, "rope_theta")


def _refuse_quantized(text: Mapping[str, Any]) -> None:
    quantization = text.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
    raise CheckpointError(
        f"config.json: quantization_config: got a checkpoint quantized with {method}, expected plain float weights. "
        "Export the original checkpoint, the one without AWQ, GPTQ, bnb or FP8 in its name"
    )


def _refuse_sliding_window(text: Mapping[str, Any]) -> None:
    layers = text.get("layer_types")
    if layers is None:
        # Before layer_types, the window applied from layer max_window_layers on.
        first = text.get("max_window_layers", 0)
        slides = text.get("use_sliding_window") and text.get("sliding_window") is not None
        if slides and first < integer(text, "num_hidden_layers"):
            raise wrong("use_sliding_window", True, f"false (it would apply from layer {first} on)")
    elif other := sorted({str(layer) for layer in layers} - {"full_attention"}):
        raise wrong("layer_types", ", ".join(other), "full_attention in every layer")
