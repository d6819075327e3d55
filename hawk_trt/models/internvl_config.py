"""The config.json of an InternVL3 checkpoint, of either make.

transformers' own (the -hf checkpoints) has text_config and vision_config, the original (internvl_chat) llm_config
and other names for the same settings. Qwen2 is the one language side that the graphs compute.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError
from hawk_trt.models import qwen_config
from hawk_trt.models.settings import expect, integer, is_integer, number, wrong
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.stages import LanguageConfig

_SPELLINGS = {"image": "<IMG_CONTEXT>", "video": "<video>", "vision_start": "<img>", "vision_end": "</img>"}
_SIZES = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
_SAME_SIZES = ("hidden_size", "intermediate_size")
_MAX_TILES = 12
# ChatML. The original's code begins with a system turn of its own, the checkpoints of transformers do not; nor do we.
_TEMPLATE_NAME = "internvl2_5"
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'text' %}
                {{- item.text }}
            {%- else %}
                {{- {'image': '<IMG_CONTEXT>', 'video': '<video>'}[item.type] + '\n' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_NORMS = ("layer_norm", "rms_norm")
# Settings of which the graphs know one value, which is also what an unsaid one means; by either make's name.
_FIXED = {
    "ps_version": "v2",
    "select_layer": -1,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
_FIXED_IN_TOWER = {
    "hidden_act": "gelu",
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
}


def language_config(config: Mapping[str, Any]) -> LanguageConfig:
    """Sizes of the language model from config.json.

    Raises:
        CheckpointError: a setting is missing or not supported, or the language side is not Qwen2.
    """
    where, text = _text(config)
    named = [str(name) for name in (*(text.get("architectures") or ()), text.get("model_type")) if name]
    if not {"Qwen2ForCausalLM", "qwen2"} & set(named):
        got = named[0] if named else "nothing"
        raise CheckpointError(
            f"config.json: {where}: got the language side {got}, expected Qwen2ForCausalLM. Of this family, InternVL3 "
            "1B, 2B, 8B, 14B, 38B and 78B have it; InternLM, Llama, Phi and Qwen3 (InternVL3.5) are not supported"
        )
    return qwen_config.language_config({**config, "text_config": text}, mrope=False)


def vision_config(config: Mapping[str, Any]) -> InternVLVision:
    """Sizes of the vision tower and projector, and how many tiles an image is cut into.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise wrong("vision_config", vision, "the sizes of the vision tower")
    where = "vision_config."
    _check_fixed(config, _FIXED, "")
    _check_fixed(vision, _FIXED_IN_TOWER, where)
    sizes: dict[str, Any] = {key: integer(vision, key, where) for key in _SAME_SIZES}
    sizes |= {key: integer(vision, name, where) for key, name in _SIZES.items()}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise wrong(f"{where}num_attention_heads", sizes["num_heads"], f"a divisor of {sizes['hidden_size']}")
    expect(f"{where}num_channels", vision.get("num_channels", 3), 3)
    image, patch = _side(vision, "image_size", where), _side(vision, "patch_size", where)
    expect("force_image_size", config.get("force_image_size") or image, image)
    ratio = number(config, "downsample_ratio")
    merge = round(1 / ratio)
    if merge * ratio != 1 or image % (patch * merge):
        raise wrong("downsample_ratio", ratio, f"1 / n, with n a divisor of the {image // patch} patches on a side")
    tokens = (image // patch // merge) ** 2
    expect("image_seq_length", config.get("image_seq_length") or tokens, tokens)
    norm = vision.get("norm_type", "layer_norm")
    if norm not in _NORMS:
        raise wrong(f"{where}norm_type", norm, " or ".join(_NORMS))
    bounds = {"min_dynamic_patch": 1, "max_dynamic_patch": _MAX_TILES, **config}
    fewest, most = integer(bounds, "min_dynamic_patch"), integer(bounds, "max_dynamic_patch")
    if config.get("dynamic_image_size") is False:
        fewest = most = 1
    return InternVLVision(
        **sizes,
        in_channels=3,
        image_size=image,
        patch_size=patch,
        spatial_merge_size=merge,
        temporal_patch_size=1,
        out_hidden_size=integer(_text(config)[1], "hidden_size"),
        norm=norm,
        layer_norm_eps=number({"layer_norm_eps": 1e-6, **vision}, "layer_norm_eps", where),
        qk_norm=bool(vision.get("use_qk_norm", vision.get("qk_normalization", False))),
        qkv_bias=bool(vision.get("attention_bias", vision.get("qkv_bias", False))),
        min_tiles=fewest,
        max_tiles=most,
        use_thumbnail=config.get("use_thumbnail") is not False,
    )


def special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> SpecialTokens:
    """Ids of the tokens that the runtime must know, None or empty where the checkpoint names none.

    vision_start and vision_end are <img> and </img>. <video> is only ever in templates and has no embedding, so its id
    may lie beyond the vocabulary. <|im_end|> always ends an answer: the original checkpoints leave that to their code.

    Raises:
        CheckpointError: an id that is not a token of the vocabulary.
    """
    known = {content: token for content, token in added_tokens.items() if content != _SPELLINGS["video"]}
    tokens = qwen_config.special_tokens({**config, "text_config": _text(config)[1]}, generation, known, _SPELLINGS)
    ends = () if tokens.im_end is None or tokens.im_end in tokens.eos else (tokens.im_end,)
    return replace(tokens, video=added_tokens.get(_SPELLINGS["video"]), eos=(*tokens.eos, *ends))


def chat_template(config: Mapping[str, Any]) -> str | None:
    """The Jinja of the "template" that an original checkpoint names; None for another, and for transformers' make."""
    return _TEMPLATE if config.get("template") == _TEMPLATE_NAME else None


def _text(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The section of the language side, with its name."""
    for name in ("text_config", "llm_config"):
        section = config.get(name)
        if isinstance(section, Mapping):
            return name, section
    raise wrong("text_config", None, "the sizes of the language model (llm_config in the original make)")


def _side(vision: Mapping[str, Any], key: str, where: str) -> int:
    """A side in pixels, given once or as two equal ones."""
    value = vision.get(key)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1] or not is_integer(sides[0]) or sides[0] < 1:
        raise wrong(where + key, value, "the side of a square, in pixels")
    return int(sides[0])


def _check_fixed(section: Mapping[str, Any], fixed: Mapping[str, object], where: str) -> None:
    for key, value in fixed.items():
        expect(where + key, section.get(key, value), value)
