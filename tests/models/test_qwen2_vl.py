"""What Qwen2-VL has of its own: config.json, times of a video, a vision tower that float16 cannot hold."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from engines.prepare import prepare
from export.__main__ import main as export
from export.architectures import family_name, read_config
from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError
from hawk_trt.models import load_family
from hawk_trt.models.family import Patches
from hawk_trt.models.vision_config import Qwen2Vision
from qwen import PROMPTS, QWEN2_VL_2B, QWEN2_VL_7B, run
from random_models import (
    VIDEO,
    generate,
    prompt,
)
from targets import ON_CPU

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
import transformers

FLOAT16_MAX = 65504.0
FC2_SCALE = 65536.0


@pytest.fixture(scope="module")
def qwen(random_qwen):
    return random_qwen("qwen2_vl")


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, qwen):
    return qwen.pipe(request.param)


def test_how_long_a_frame_lasts_makes_no_difference(pipe):
    inputs = prompt(1176, **PROMPTS["video"])
    slow = dataclasses.replace(inputs, second_per_grid_ts=[3.7])
    np.testing.assert_array_equal(run(pipe, inputs, 0.3).logits, run(pipe, slow, 0.3).logits)
    times = pipe.processor.layout(inputs).position_ids[0][inputs.input_ids == VIDEO]
    assert (np.unique(times) - times[0]).tolist() == [0, 1, 2]


def test_float16_holds_where_the_vision_mlp_passes_its_range(qwen, tmp_path):
    shutil.copytree(qwen.checkpoint, tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name in tensors:
        if "visual.blocks.0.mlp.fc2" in name:
            tensors[name] = tensors[name] * np.float32(FC2_SCALE)
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors", {"format": "pt"})
    inputs = prompt(1176, **PROMPTS["one image"])
    patches = Patches(inputs.pixel_values, inputs.image_grid_thw)
    embeds = []
    for dtype in ("float16", "float32"):
        assert export([str(tmp_path / "checkpoint"), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
        bundle = Bundle.load(tmp_path / dtype)
        # As TensorRT gets it, and not in ONNX Runtime, whose CPU provider computes in float32 throughout.
        graph = onnx.load_from_string(prepare(bundle, "vision", "portable", max_context=64, plugin=False).content)
        onnx.external_data_helper.load_external_data_for_model(graph, str(bundle.folder))
        vision = ReferenceEvaluator(graph)
        feeds = next(load_family(bundle.manifest.vision).vision_feeds(patches, 10_000))
        embeds.append(vision.run(None, feeds)[0].astype(np.float32))
    half, full = embeds
    np.testing.assert_allclose(half, full, rtol=0, atol=0.02 * np.abs(full).max())


def test_the_vision_mlp_of_that_test_does_pass_the_range(qwen):
    """Else the test above would pass whatever the emission."""
    mlp = qwen.model.model.visual.blocks[0].mlp
    entered = []
    hook = mlp.register_forward_pre_hook(lambda _module, args: entered.append(args[0].clone()))
    generate(qwen.model, prompt(1176, **PROMPTS["one image"]), 1)
    hook.remove()
    with torch.inference_mode():
        assert (FC2_SCALE * mlp(entered[0])).abs().max() > 2 * FLOAT16_MAX
        assert (FC2_SCALE * mlp.fc2.weight).abs().max() < FLOAT16_MAX


@pytest.mark.parametrize(
    ("config", "language", "vision"),
    [(QWEN2_VL_2B, (1536, 28, 12, 2, True), 1536), (QWEN2_VL_7B, (3584, 28, 28, 4, False), 3584)],
    ids=["2B", "7B"],
)
def test_the_released_configs_are_read(config, language, vision):
    assert family_name(config) == "qwen2_vl"
    sizes = read_config(config).language
    got = (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads, sizes.num_key_value_heads)
    assert (*got, sizes.tie_word_embeddings) == language
    assert (sizes.head_dim, sizes.mrope_section, sizes.rope_theta) == (128, (16, 24, 24), 1e6)
    assert not (sizes.qk_norm or sizes.mrope_interleaved or sizes.deepstack_levels)
    assert read_config(config).vision == Qwen2Vision(
        depth=32, hidden_size=1280, intermediate_size=5120, num_heads=16, in_channels=3,
        patch_size=14, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=vision,
        rope_theta=10000.0,
    )  # fmt: skip


def test_the_defaults_are_those_of_transformers():
    read = read_config(QWEN2_VL_7B).vision
    default = transformers.Qwen2VLConfig(**QWEN2_VL_7B).vision_config
    assert (read.depth, read.hidden_size, read.out_hidden_size) == (
        default.depth, default.embed_dim, default.hidden_size,
    )  # fmt: skip
    assert read.intermediate_size == default.embed_dim * default.mlp_ratio


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("embed_dim", 0), ("hidden_size", 1000), ("num_heads", 3)]
)
def test_a_vision_setting_that_cannot_be_used_is_named(key, value):
    config = QWEN2_VL_7B | {"vision_config": QWEN2_VL_7B["vision_config"] | {key: value}}
    with pytest.raises(CheckpointError, match=rf"vision_config\.({key}|out_hidden_size)"):
        read_config(config)
