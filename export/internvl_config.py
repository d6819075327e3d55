"""The config.json of an InternVL3 or InternVL3.5 checkpoint, of either make.

transformers' own (the -hf checkpoints) has text_config and vision_config, the original (internvl_chat) llm_config
and other names for the same settings. Qwen2 and Qwen3 are the language sides that the graphs compute.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError
from hawk_trt.models.vision_config import InternVLVision

from .config import ModelConfig, Section, is_integer, language_config, text_section, vision_section
from .config import special_tokens as named_tokens

# Each by its architecture and its model_type; a config says either or both.
_QWEN2, _QWEN3 = {"Qwen2ForCausalLM", "qwen2"}, {"Qwen3ForCausalLM", "qwen3"}
_SPELLINGS = {"image": "<IMG_CONTEXT>", "video": "<video>", "vision_start": "<img>", "vision_end": "</img>"}
_MAX_TILES = 12
_MOST_PIXELS = 2**16
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
    "num_channels": 3,
}
_TOWER_DEFAULTS = {"norm_type": "layer_norm", "layer_norm_eps": 1e-6}
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


def read(config: Mapping[str, Any], generation: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelConfig:
    """The model of a config.json of either make; see architectures.read_config."""
    config = _with_text_config(config)
    qwen3 = bool(_QWEN3 & set(_language_side(config["text_config"])))
    return ModelConfig(
        language_config(config, mrope=False, qk_norm=qwen3),
        _vision_config(config),
        _special_tokens(config, generation, added_tokens),
        # of an original checkpoint; transformers' make has its own
        _TEMPLATE if config.get("template") == _TEMPLATE_NAME else None,
    )


def as_transformers(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> dict[str, Any] | None:
    """The settings of an original checkpoint as transformers' make has them; None where config.json is of that make.

    As far as a model in PyTorch asks for them: for parity, since transformers reads the original only with code that
    lies beside it.
    """
    if "llm_config" not in config or "text_config" in config:
        return None
    model = read(config, {}, added_tokens)
    vision = model.vision
    assert isinstance(vision, InternVLVision)
    text = dict(_with_text_config(config)["text_config"])
    return {
        "model_type": "internvl",
        "text_config": text | {"model_type": "qwen3" if bool(_QWEN3 & set(_language_side(text))) else "qwen2"},
        "vision_config": {
            **{"num_hidden_layers": vision.depth, "num_attention_heads": vision.num_heads},
            **{"hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size},
            **{"image_size": [vision.image_size] * 2, "patch_size": [vision.patch_size] * 2},
            **{"norm_type": vision.norm, "layer_norm_eps": vision.layer_norm_eps},
            **{"use_qk_norm": vision.qk_norm, "attention_bias": vision.qkv_bias},
        },
        "downsample_ratio": 1 / vision.spatial_merge_size,
        "image_seq_length": (vision.image_size // vision.patch_size // vision.spatial_merge_size) ** 2,
        "image_token_id": model.special_tokens.image,
        "tie_word_embeddings": model.language.tie_word_embeddings,
    }


def _with_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json with the language side, Qwen2 or Qwen3, under text_config, whichever make it is of."""
    where = next((name for name in ("text_config", "llm_config") if isinstance(config.get(name), Mapping)), None)
    if where is None:
        expected = "the sizes of the language model (llm_config in the original make)"
        raise Section({}).wrong("text_config", expected)
    text: Mapping[str, Any] = config[where]
    named = _language_side(text)
    if bool(_QWEN2 & set(named)) == bool(_QWEN3 & set(named)):
        got = " and ".join(name for name in named if name in _QWEN2 | _QWEN3) or (named or ["nothing"])[0]
        raise CheckpointError(
            f"config.json: {where}: got the language side {got}, expected "
            "Qwen2ForCausalLM (InternVL3) or Qwen3ForCausalLM (InternVL3.5 1B, 2B, 4B, 8B, 14B and 38B); mixtures of "
            "experts, GPT-OSS, InternLM, Llama and Phi are not supported"
        )
    return {**config, "text_config": text}


def _vision_config(config: Mapping[str, Any]) -> InternVLVision:
    model, vision = Section(config), vision_section(config, _TOWER_DEFAULTS)
    for section, fixed in ((model, _FIXED), (vision, _FIXED_IN_TOWER)):
        for key, value in fixed.items():
            section.expect(key, value, value)
    if model.get("flash_relative_threshold") is not None:
        advice = "none: InternVL3.5-Flash shortens each tile by what it shows. Take the InternVL3.5 of its size"
        raise model.wrong("flash_relative_threshold", advice)
    hidden_size, num_heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise vision.wrong("num_attention_heads", f"a divisor of {hidden_size}")
    image, patch = _side(vision, "image_size"), _side(vision, "patch_size")
    ratio = model.number("downsample_ratio")
    merge = round(1 / ratio)
    if merge * ratio != 1 or image % (patch * merge):
        raise model.wrong("downsample_ratio", f"1 / n, with n a divisor of the {image // patch} patches on a side")
    for key, value in (("force_image_size", image), ("image_seq_length", (image // patch // merge) ** 2)):
        if model.get(key):
            model.expect(key, value)
    if vision.get("norm_type") not in _NORMS:
        raise vision.wrong("norm_type", " or ".join(_NORMS))
    bounds = Section({"min_dynamic_patch": 1, "max_dynamic_patch": _MAX_TILES, **config})
    fewest, most = bounds.integer("min_dynamic_patch"), bounds.integer("max_dynamic_patch")
    if model.get("dynamic_image_size") is False:
        fewest = most = 1
    return InternVLVision(
        depth=vision.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=vision.integer("intermediate_size"),
        num_heads=num_heads,
        in_channels=3,
        image_size=image,
        patch_size=patch,
        spatial_merge_size=merge,
        temporal_patch_size=1,
        out_hidden_size=text_section(config).integer("hidden_size"),
        norm=vision.get("norm_type"),
        layer_norm_eps=vision.number("layer_norm_eps"),
        qk_norm=bool(vision.get("use_qk_norm", vision.get("qk_normalization", False))),
        qkv_bias=bool(vision.get("attention_bias", vision.get("qkv_bias", False))),
        min_tiles=fewest,
        max_tiles=most,
        use_thumbnail=model.get("use_thumbnail") is not False,
    )


def _special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> SpecialTokens:
    """Ids of the tokens that the runtime must know; vision_start and vision_end are <img> and </img>.

    <video> is only ever in templates and has no embedding, so its id may lie beyond the vocabulary. <|im_end|> always
    ends an answer: the original checkpoints leave that to their code.
    """
    known = {content: token for content, token in added_tokens.items() if content != _SPELLINGS["video"]}
    tokens = named_tokens(config, generation, known, _SPELLINGS)
    ends = () if tokens.im_end is None or tokens.im_end in tokens.eos else (tokens.im_end,)
    return replace(tokens, video=added_tokens.get(_SPELLINGS["video"]), eos=(*tokens.eos, *ends))


def _language_side(text: Mapping[str, Any]) -> list[str]:
    """What a section calls its language model."""
    named = text.get("architectures")
    return [str(name) for name in (*(named if isinstance(named, list) else ()), text.get("model_type")) if name]


def _side(vision: Section, key: str) -> int:
    """A side in pixels, given once or as two equal ones."""
    value = vision.get(key)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1] or not is_integer(sides[0]) or not 1 <= sides[0] <= _MOST_PIXELS:
        raise vision.wrong(key, "the side of a square, in pixels")
    return int(sides[0])
