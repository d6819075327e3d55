"""Small random checkpoints of the Qwen line, the prompts that fit them, and the released config.json files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from export.__main__ import main as export
from export.real_shapes import shape_config
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from random_models import EOS, IM_END, IM_END_OPTION, IMAGE, TOKEN_IDS, VIDEO, VISION_END, VOCAB, save_random

TOKENS = PromptTokens(image=IMAGE, video=VIDEO, vision_end=VISION_END, im_start=None, im_end=IM_END)
STEPS = 5
PROMPTS = {
    "one image": {"images": [(1, 8, 12)]},
    "several images": {"images": [(1, 8, 12), (1, 8, 12), (1, 4, 6)]},
    "video": {"videos": [(3, 8, 8)]},
    "image and videos": {"images": [(1, 8, 4)], "videos": [(2, 4, 8), (2, 6, 6)]},
    "no image": {},
}
LONG_VIDEO = {"videos": [(7, 4, 8)]}
TEXT = {
    "vocab_size": VOCAB,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": EOS,
}

# config.json of Qwen2-VL-2B-Instruct and Qwen2-VL-7B-Instruct, without what no graph depends on.
QWEN2_VL_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "vocab_size": 151936,
}
QWEN2_VL_7B = QWEN2_VL_2B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "vocab_size": 152064,
}
# config.json of Qwen3-VL-4B-Instruct and Qwen3-VL-8B-Instruct, without what no graph depends on.
QWEN3_VL_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
QWEN3_VL_4B = QWEN3_VL_8B | {
    "text_config": QWEN3_VL_8B["text_config"]
    | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "tie_word_embeddings": True,
    "vision_config": QWEN3_VL_8B["vision_config"]
    | {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
    },
}
QWEN3_5_08B, QWEN3_5_27B = shape_config("qwen3.5-0.8b"), shape_config("qwen3.5-27b")
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def random_qwen2_vl():
    """A model of transformers, its weights not yet set."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"hidden_size": 64, "num_hidden_layers": 3, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **TOKEN_IDS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def random_qwen3_vl():
    """A model of transformers, its weights not yet set."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"hidden_size": 48, "num_hidden_layers": 5, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        **TOKEN_IDS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def random_qwen3_5(layer_types=None):
    """A model of transformers, its weights not yet set: layers 3 and 7 of 8 have full attention unless told."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 16, "conv_kernel_dim": 4}
    rope["partial_rotary_factor"] = 0.5
    sizes = {"hidden_size": 64, "num_hidden_layers": len(layer_types or range(8)), "head_dim": 16}
    sizes |= {"rope_parameters": rope, "layer_types": layer_types}
    config = transformers.Qwen3_5Config(
        text_config=TEXT | sizes | {f"linear_{name}": size for name, size in linear.items()},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
        },
        **TOKEN_IDS,
    )
    return transformers.Qwen3_5ForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class Qwen:
    """What the tests of a family need.

    released: config.json of released checkpoints, without what no graph depends on. preprocessor: of the patches that
    are held against transformers'. prompts: those that transformers' own generate takes too.
    """

    make: Callable[[], Any]
    patch_dim: int
    prompts: dict[str, dict[str, Any]]
    released: dict[str, dict[str, Any]]
    preprocessor: dict[str, Any]


# Of Qwen3-VL and Qwen3.5 each frame of a video stands apart. Of Qwen2-VL a video of more frames than tokens on a side
# is for HAWK's reference alone: there transformers 5 leaves the documented rule, whose positions the it is given.
_FRAME_SPANS = {
    name: shown | ({"frame_spans": True} if "videos" in shown else {})
    for name, shown in (PROMPTS | {"long video": LONG_VIDEO}).items()
}
# transformers is slow without its kernels for linear attention, so fewer prompts have to do.
_HYBRID = {name: _FRAME_SPANS[name] for name in ("one image", "several images", "video", "no image")}
QWENS = {
    "qwen2_vl": Qwen(
        random_qwen2_vl,
        1176,
        PROMPTS,
        {"2B": QWEN2_VL_2B, "7B": QWEN2_VL_7B},
        {"min_pixels": 3136, "max_pixels": 602112},
    ),
    "qwen3_vl": Qwen(random_qwen3_vl, 1536, _FRAME_SPANS, {"4B": QWEN3_VL_4B, "8B": QWEN3_VL_8B}, PREPROCESSOR),
    "qwen3_5": Qwen(random_qwen3_5, 1536, _HYBRID, {"0.8B": QWEN3_5_08B, "27B": QWEN3_5_27B}, PREPROCESSOR),
}


class RandomQwen:
    """A small random checkpoint of a family, and what is made of it when first asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family, self._folder = QWENS[name], folder
        self._pipes: dict[str, Pipeline] = {}
        self.model = self.family.make()
        self.checkpoint = save_random(self.model, folder / "checkpoint", 1)

    @cached_property
    def bundle(self) -> Path:
        """Its bundle, in float32."""
        assert export([str(self.checkpoint), "--out", str(self._folder / "bundle"), *IM_END_OPTION]) == 0
        return self._folder / "bundle"

    def pipe(self, target: str) -> Pipeline:
        """Its bundle, loaded once for each target."""
        if target not in self._pipes:
            self._pipes[target] = Pipeline.load(self.bundle, target=target, threads=1)
        return self._pipes[target]

    def close(self) -> None:
        """Release what was loaded."""
        for pipe in self._pipes.values():
            pipe.close()

    @cached_property
    def reference(self) -> Any:
        """HAWK inserted into transformers."""
        from hawk_trt.apps.parity.reference import Reference

        return Reference.load(self.checkpoint, head_weights=(0.25,) * 4, normalization="l2")


def run(pipe, inputs, keep_ratio):
    """Generate some tokens, with their logits."""
    pruning = PruningConfig(keep_ratio=keep_ratio)
    return pipe.generate(inputs, pruning=pruning, max_new_tokens=STEPS, ignore_eos=True, return_logits=True)
