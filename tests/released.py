"""config.json of released models, by their names on the hub: the sizes alone, the rest as their family has it."""

import copy
from typing import Any

from export.real_shapes import shape_config
from internvl import original, original_35
from qwen import QWEN2_VL_2B, QWEN3_VL_8B


def qwen2_vl(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool = False):
    """A Qwen2-VL; the tower is the same in all."""
    return QWEN2_VL_2B | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "vision_config": {"depth": 32, "hidden_size": hidden, "in_chans": 3},
    }


def qwen3_vl(hidden: int, inner: int, layers: int, heads: int, *, small_tower: bool, tied: bool):
    """A dense Qwen3-VL, with one of the two towers."""
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    small = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return QWEN3_VL_8B | {
        "text_config": QWEN3_VL_8B["text_config"] | text,
        "tie_word_embeddings": tied,
        "vision_config": QWEN3_VL_8B["vision_config"] | (small if small_tower else {}) | {"out_hidden_size": hidden},
    }


MODELS = {
    "Qwen2-VL-2B-Instruct": qwen2_vl(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2-VL-7B-Instruct": qwen2_vl(3584, 18944, 28, 28, 4, 152064),
    "Qwen2-VL-72B-Instruct": qwen2_vl(8192, 29568, 80, 64, 8, 152064),
    **{
        f"Qwen2.5-VL-{size}-Instruct": shape_config(f"qwen2.5-vl-{size.lower()}") for size in ("3B", "7B", "32B", "72B")
    },
    "Qwen3-VL-2B-Instruct": qwen3_vl(2048, 6144, 28, 16, small_tower=True, tied=True),
    "Qwen3-VL-4B-Instruct": qwen3_vl(2560, 9728, 36, 32, small_tower=True, tied=True),
    "Qwen3-VL-8B-Instruct": QWEN3_VL_8B,
    "Qwen3-VL-32B-Instruct": qwen3_vl(5120, 25600, 64, 64, small_tower=False, tied=False),
    **{f"Qwen3.5-{size}": shape_config(f"qwen3.5-{size.lower()}") for size in ("0.8B", "2B", "4B", "9B", "27B")},
    **{f"InternVL3-{size}": original(size) for size in ("1B", "2B", "8B", "14B", "38B", "78B")},
    **{f"InternVL3_5-{size}": original_35(size) for size in ("1B", "2B", "4B", "8B", "14B", "38B")},
}


def with_few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with two layers on each side; a hybrid with two of each kind."""
    config = copy.deepcopy(config)
    text = config.get("text_config") or config.get("llm_config") or config
    vision = config["vision_config"]
    text["num_hidden_layers"] = 2
    if "full_attention_interval" in text:
        text |= {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    for key in ("depth", "num_hidden_layers"):
        if key in vision:
            vision[key] = 2
    for key, blocks in (("fullatt_block_indexes", [1]), ("deepstack_visual_indexes", [0])):
        if vision.get(key):
            vision[key] = blocks
    return config
