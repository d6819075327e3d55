"""Qwen2-VL: against transformers' own model, unpruned and with HAWK inserted, and its processors."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from engines.prepare import prepare
from export.__main__ import main as export
from export.graphs import inventory
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError
from hawk_trt.models.family import Patches
from hawk_trt.models.registry import family_name, load_family, read_config
from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.stages import DTYPES
from image_processors import check_patches
from random_models import (
    EOS,
    IM_END,
    IM_END_OPTION,
    IMAGE,
    TOKEN_IDS,
    VIDEO,
    VISION_END,
    VOCAB,
    generate,
    prompt,
    released_shapes,
    save_random,
)
from targets import ON_CPU
from vision_tiles import assert_tiles_compute_the_same

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
import transformers

from hawk_trt.apps.parity.reference import Reference

TOKENS = PromptTokens(image=IMAGE, video=VIDEO, vision_end=VISION_END, im_start=None, im_end=IM_END)
STEPS = 5
FLOAT16_MAX = 65504.0
FC2_SCALE = 65536.0
# A video of more frames than tokens on a side: there transformers 5 leaves the documented rule, so that only the
# reference, which is given that rule's positions, is compared.
LONG_VIDEO = {"videos": [(7, 4, 8)]}
PROMPTS = {
    "one image": {"images": [(1, 8, 12)]},
    "several images": {"images": [(1, 8, 12), (1, 8, 12), (1, 4, 6)]},
    "video": {"videos": [(3, 8, 8)]},
    "image and videos": {"images": [(1, 8, 4)], "videos": [(2, 4, 8), (2, 6, 6)]},
    "no image": {},
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": EOS,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **TOKEN_IDS,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    return save_random(model, tmp_path_factory.mktemp("qwen2_vl") / "checkpoint", 1), model


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl") / "bundle"
    assert export([str(checkpoint[0]), "--out", str(folder), *IM_END_OPTION]) == 0
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference.load(checkpoint[0], head_weights=(0.25,) * 4, normalization="l2")


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, bundle):
    with Pipeline.load(bundle, target=request.param) as pipe:
        yield pipe


def run(pipe, inputs, keep_ratio):
    pruning = PruningConfig(keep_ratio=keep_ratio)
    return pipe.generate(inputs, pruning=pruning, max_new_tokens=STEPS, ignore_eos=True, return_logits=True)


@pytest.mark.parametrize("name", PROMPTS)
def test_unpruned_it_generates_what_transformers_generates(pipe, checkpoint, name):
    inputs = prompt(1176, **PROMPTS[name])
    tokens, logits = generate(checkpoint[1], inputs, STEPS)
    result = run(pipe, inputs, 1.0)
    assert result.token_ids == tokens
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=1e-3)  # 1e-5 seen


@pytest.mark.parametrize("keep_ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", [*PROMPTS, "long video"])
def test_it_equals_hawk_in_transformers(pipe, reference, name, keep_ratio):
    inputs = prompt(1176, **(PROMPTS | {"long video": LONG_VIDEO})[name], seed=1)
    result = run(pipe, inputs, keep_ratio)
    expected = reference.run(reference.embed(inputs, TOKENS), PruningConfig(keep_ratio=keep_ratio), steps=STEPS)
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    assert result.token_ids == list(expected.tokens)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


def test_a_batch_equals_its_rows_one_by_one(pipe):
    rows = [prompt(1176, **shown, seed=number) for number, shown in enumerate(PROMPTS.values())]
    options = {"pruning": PruningConfig(keep_ratio=0.3), "max_new_tokens": STEPS, "ignore_eos": True}
    for inputs, result in zip(rows, pipe.generate_batch(rows, **options, return_logits=True), strict=True):
        alone = run(pipe, inputs, 0.3)
        assert result.token_ids == alone.token_ids
        np.testing.assert_array_equal(result.kept_indices, alone.kept_indices)
        np.testing.assert_allclose(result.logits, alone.logits, rtol=0, atol=1e-4)


def test_how_long_a_frame_lasts_makes_no_difference(pipe):
    inputs = prompt(1176, **PROMPTS["video"])
    slow = dataclasses.replace(inputs, second_per_grid_ts=[3.7])
    np.testing.assert_array_equal(run(pipe, inputs, 0.3).logits, run(pipe, slow, 0.3).logits)
    times = pipe.processor.layout(inputs).position_ids[0][inputs.input_ids == VIDEO]
    assert (np.unique(times) - times[0]).tolist() == [0, 1, 2]


def test_the_vision_stage_in_tiles_of_tokens_computes_the_same(checkpoint, tmp_path, monkeypatch):
    inputs = prompt(1176, images=[(1, 6, 8)])
    assert_tiles_compute_the_same(checkpoint[0], tmp_path / "tiles", inputs, monkeypatch, *IM_END_OPTION)


def test_the_parity_command_agrees(bundle, checkpoint, capsys):
    command = ["parity", str(bundle), "--checkpoint", str(checkpoint[0]), "--keep-ratio", "0.3", "--steps", "2"]
    assert hawk_trt([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_every_graph_passes_the_checker_and_strict_shape_inference(checkpoint, tmp_path):
    for dtype in DTYPES:
        assert export([str(checkpoint[0]), "--out", str(tmp_path / dtype), "--dtype", dtype, *IM_END_OPTION]) == 0
    files = sorted(tmp_path.glob("*/*.onnx"))
    assert len(files) == 2 * 12 + 9  # bfloat16 without cpu
    for file in files:
        onnx.checker.check_model(file, full_check=True)
        onnx.shape_inference.infer_shapes_path(
            file, tmp_path / "inferred.onnx", check_type=True, strict_mode=True, data_prop=True
        )
    with Pipeline.load(tmp_path / "float16") as half, Pipeline.load(tmp_path / "float32") as full:
        inputs = prompt(1176, **PROMPTS["several images"])
        one, other = run(half, inputs, 1.0), run(full, inputs, 1.0)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=5e-3)
        assert np.corrcoef(one.logits[0], other.logits[0])[0, 1] > 0.999


def test_float16_holds_where_the_vision_mlp_passes_its_range(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "checkpoint")
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


def test_the_vision_mlp_of_that_test_does_pass_the_range(checkpoint):
    """Else the test above would pass whatever the emission."""
    mlp = checkpoint[1].model.visual.blocks[0].mlp
    entered = []
    hook = mlp.register_forward_pre_hook(lambda _module, args: entered.append(args[0].clone()))
    generate(checkpoint[1], prompt(1176, **PROMPTS["one image"]), 1)
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


@pytest.mark.parametrize("config", [QWEN2_VL_2B, QWEN2_VL_7B], ids=["2B", "7B"])
def test_the_released_sizes_have_the_tensors_that_the_exporter_expects(config):
    model = read_config(config)
    expected = inventory(model.language, model.vision)
    assert expected == released_shapes(config, transformers.Qwen2VLForConditionalGeneration)


SIZES = [(28, 28), (57, 91), (224, 224), (333, 500), (768, 900), (30, 900), (999, 1500)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_equal_those_of_transformers(size):
    bounds = {"min_pixels": 3136, "max_pixels": 602112}
    check_patches(load_family(read_config(QWEN2_VL_2B).vision), bounds, size)
