"""Configs of released models by name, so that models of their shapes can be made without their weights.

The names are those of `python -m export --shape`. Sizes are public facts from the checkpoints' config.json files.
"""

from copy import deepcopy
from typing import Any

from hawk_trt.errors import InvalidInput


def _qwen2_5_vl(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int, vision_inner: int = 3420
) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL: the language model's sizes (heads: query, key and value), and the tower's."""
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
        "use_sliding_window": False,
        "rope_parameters": {**rope, "rope_theta": 1e6},
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "tie_word_embeddings": hidden < 3584,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "eos_token_id": 151645,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_inner,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    }


_SHAPES = {
    "qwen2.5-vl-3b": _qwen2_5_vl(2048, 11008, 36, (16, 2), 151936),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 18944, 28, (28, 4), 152064),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 27648, 64, (40, 8), 152064, 3456),
    "qwen2.5-vl-72b": _qwen2_5_vl(8192, 29568, 80, (64, 8), 152064, 3456),
}
SHAPES = tuple(_SHAPES)


def shape_config(shape: str, layers: int | None = None, vision_layers: int | None = None) -> dict[str, Any]:
    """config.json of a released model, with fewer layers where asked for.

    The last of fewer vision layers attends over whole frames, as the last of all does.

    Args:
        shape: one of SHAPES.
        layers: of the language model; None takes all.
        vision_layers: of the vision tower; None takes all.

    Raises:
        InvalidInput: an unknown name, or a number of layers that the model does not have.
    """
    if shape not in _SHAPES:
        raise InvalidInput(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    config = deepcopy(_SHAPES[shape])
    text, vision = config["text_config"], config["vision_config"]
    for name, got, part, key, least in (
        ("layers", layers, text, "num_hidden_layers", 2),
        ("vision-layers", vision_layers, vision, "depth", 1),
    ):
        if got is not None and not least <= got <= part[key]:
            raise InvalidInput(f"{name}: got {got}, expected {least} to {part[key]}, as many as {shape} has")
        part[key] = got or part[key]
    depth = vision["depth"]
    whole = [index for index in vision["fullatt_block_indexes"] if index < depth]
    vision["fullatt_block_indexes"] = sorted({*whole, depth - 1})
    return config
