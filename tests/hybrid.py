"""Small language models with and without linear layers: sizes, and a random bundle."""

import shutil
from dataclasses import replace
from pathlib import Path

from export.random_checkpoint import random_checkpoint
from export.writer import ExportOptions, export
from hawk_trt import PruningConfig, Request
from hawk_trt.stages import LanguageConfig, LinearAttentionConfig
from random_models import EOS, IM_END, TOKEN_IDS, prompt

_TINY = Path(__file__).parent.parent / "examples" / "tiny-vlm"
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

CONFIG = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "eos_token_id": EOS,
    "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": EOS,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 64,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 12,
        "max_position_embeddings": 4096,
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e7,
            "rope_type": "default",
        },
        "vocab_size": 464,  # as many as the shipped tokenizer has
    },
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 48,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    **TOKEN_IDS,
}


# of different lengths, with one image, two, a video and none
PROMPTS = [
    prompt(1536, images=[(1, 4, 8)], seed=1, text=6),
    prompt(1536, images=[(1, 6, 6), (1, 4, 4)], seed=2, text=3),
    prompt(1536, videos=[(2, 4, 4)], seed=3, frame_spans=True, text=9),
    prompt(1536, seed=4, text=4),
]
RATIOS = (0.3, 0.5, 1.0, 0.4)


def ask(number: int, new_tokens: int = 5, **pruning) -> Request:
    config = PruningConfig(**({"keep_ratio": RATIOS[number]} | pruning))
    return Request(PROMPTS[number], pruning=config, max_new_tokens=new_tokens, ignore_eos=True, return_logits=True)


def export_random(folder: Path) -> Path:
    """A bundle of CONFIG with random weights."""
    (folder / "checkpoint").mkdir()
    shutil.copyfile(_TINY / "tokenizer.json", folder / "checkpoint" / "tokenizer.json")
    checkpoint = random_checkpoint(folder / "checkpoint", CONFIG)
    export(checkpoint, folder / "bundle", ExportOptions(im_end_token_id=IM_END), name="hybrid")
    return folder / "bundle"
