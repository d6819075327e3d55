"""Small random InternVL checkpoints, saved by transformers, and the same ones as the original make has them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from export.__main__ import main as export
from hawk_trt import ModelInputs

TINY_VLM = Path(__file__).parent.parent / "examples" / "tiny-vlm"
TILE_PX, TILE_TOKENS = 56, 4
_LARGE_TOWER = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
# Settings of a tower, and of a language side: InternVL3's small and large towers, then InternVL3.5's.
CHECKPOINTS = {
    "layer_norm": {},
    "rms_norm": _LARGE_TOWER,
    "qwen3": {"qwen3": True},
    "qwen3_rms_norm": {"qwen3": True, **_LARGE_TOWER},
}
START, END, CONTEXT, VIDEO = 464, 465, 466, 467  # behind the shipped tokenizer's own
IM_END, VOCAB_SIZE = 458, 467  # <video> is in templates alone, so it needs no embedding

# As transformers' checkpoints have it; the jinja is ours.
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part.type == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# transformers' names in what the original calls them, after the prefixes.
_ORIGINAL = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "ls"),
)
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}


def export_all(folder):
    """Each checkpoint, and beside it its bundle, NAME.bundle; returns the folder."""
    for name, settings in CHECKPOINTS.items():
        save_checkpoint(folder / name, **settings)
        assert export([str(folder / name), "--out", str(folder / f"{name}.bundle")]) == 0
    return folder


def save_checkpoint(folder, *, qwen3=False, tied=False, seed=0, **tower):
    """A random float32 model with tokenizer, template and preprocessor config; tower: more vision settings."""
    import torch
    import transformers
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    torch.manual_seed(seed)
    if qwen3:
        side, own = transformers.Qwen3Config, {"head_dim": 24}  # not hidden_size / heads, as in InternVL3.5 1B and 4B
    else:
        scaling = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
        side, own = transformers.Qwen2Config, {"rope_scaling": scaling}
    text = side(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        eos_token_id=IM_END,
        **own,
    )
    vision = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[TILE_PX, TILE_PX],
        patch_size=[14, 14],
        **{"attention_bias": True} | tower,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=CONTEXT,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(float("norm" in name and name.endswith("weight")) + 0.15 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    _write_texts(folder)
    write(folder / "chat_template.jinja", TEMPLATE)
    return folder


def save_original(converted, folder):
    """The checkpoint of save_checkpoint as the original make has it."""
    tensors = load_file(converted / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("model.")
        if new.startswith("multi_modal_projector."):
            part, kind = new.removeprefix("multi_modal_projector.").split(".")
            new = f"{_PROJECTOR[part]}.{kind}"
        elif new.startswith("vision_tower."):
            new = "vision_model." + new.removeprefix("vision_tower.")
            for theirs, original in _ORIGINAL:
                new = new.replace(theirs, original)
        renamed[new] = tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        renamed[name.replace("q_proj", "qkv")] = np.concatenate(parts)
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((converted / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {"architectures": [f"{text['model_type'].capitalize()}ForCausalLM"], "rope_theta": rope["rope_theta"]}
    dynamic = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    text |= {"rope_scaling": dynamic if rope["rope_type"] == "dynamic" else None, "eos_token_id": 456}
    vision |= {"qkv_bias": vision.pop("attention_bias"), "qk_normalization": vision.pop("use_qk_norm")}
    vision |= {"image_size": TILE_PX, "patch_size": 14}
    original = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": text,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "force_image_size": TILE_PX,
        "ps_version": "v2",
        "select_layer": -1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "template": "internvl2_5",
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    write(folder / "config.json", json.dumps(original))
    _write_texts(folder, size=TILE_PX)
    return folder


def _write_texts(folder, size=None):
    tokenizer = json.loads((TINY_VLM / "tokenizer.json").read_text())
    for index, content in ((START, "<img>"), (END, "</img>"), (CONTEXT, "<IMG_CONTEXT>"), (VIDEO, "<video>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": index, "content": content, "special": True, **flags})
    write(folder / "tokenizer.json", json.dumps(tokenizer))
    size = size or {"height": TILE_PX, "width": TILE_PX}
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    write(folder / "preprocessor_config.json", json.dumps({"size": size, "crop_to_patches": False, **mean}))


def write(path, content):
    """Write a text file."""
    path.write_text(content, encoding="utf-8")


def tensors(runs, seed=0):
    """A prompt with runs of placeholders of so many tiles each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 450, 4).tolist()
    for tiles in runs:
        ids += [*rng.integers(0, 450, 2).tolist(), START, *[CONTEXT] * tiles * TILE_TOKENS, END]
    ids += [*rng.integers(0, 450, 7).tolist(), IM_END, *rng.integers(0, 450, 3).tolist()]
    pixels = rng.standard_normal((sum(runs), 3, TILE_PX, TILE_PX), dtype=np.float32) if runs else None
    return ModelInputs(np.array(ids), pixel_values=pixels)


def theirs(model, rows, steps):
    """Tokens and logits of transformers' own generate, over a left-padded batch."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    pads = [longest - len(row.input_ids) for row in rows]
    ids = np.stack([np.pad(row.input_ids, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    mask = np.stack([np.arange(longest) >= pad for pad in pads]).astype(np.int64)
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    shown = {"pixel_values": torch.from_numpy(np.concatenate(pixels))} if pixels else {}
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            **shown,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return out.sequences[:, longest:].tolist(), torch.stack(out.logits, 1).numpy()


# Of the released checkpoints: hidden, intermediate, layers, heads, kv heads of the language side, and its parameters
# with those of the tower and projector, in billions.
RELEASED = {
    "1B": (896, 4864, 24, 14, 2, 0.94),
    "2B": (1536, 8960, 28, 12, 2, 2.09),
    "8B": (3584, 18944, 28, 28, 4, 7.94),
    "14B": (5120, 13824, 48, 40, 8, 15.1),
    "38B": (5120, 27648, 64, 40, 8, 38.4),
    "78B": (8192, 29568, 80, 64, 8, 78.4),
}
# The same of InternVL3.5: Qwen3's sizes, whose heads all have 128 numbers.
RELEASED_35 = {
    "1B": (1024, 3072, 28, 16, 8, 1.1),
    "2B": (2048, 6144, 28, 16, 8, 2.3),
    "4B": (2560, 9728, 36, 32, 8, 4.7),
    "8B": (4096, 12288, 36, 32, 8, 8.5),
    "14B": (5120, 17408, 40, 40, 8, 15.1),
    "38B": (5120, 25600, 64, 64, 8, 38.4),
}


def original(size="8B"):
    """config.json of OpenGVLab/InternVL3-*."""
    hidden, inner, layers, heads, kv_heads, _ = RELEASED[size]
    large = size in ("38B", "78B")
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "moe_config": None,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151674,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "hidden_size": 3200 if large else 1024,
            "image_size": 448,
            "intermediate_size": 12800 if large else 4096,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm" if large else "layer_norm",
            "num_attention_heads": 25 if large else 16,
            "num_channels": 3,
            "num_hidden_layers": 45 if large else 24,
            "patch_size": 14,
            "qk_normalization": large,
            "qkv_bias": not large,
        },
    }


def original_35(size="8B"):
    """config.json of OpenGVLab/InternVL3_5-*, without what no graph depends on."""
    hidden, inner, layers, heads, kv_heads, _ = RELEASED_35[size]
    config = original("38B" if size == "38B" else "8B")
    config["llm_config"] |= {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_scaling": None,
        "vocab_size": 151936,
    }
    return config
