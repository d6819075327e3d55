"""Qwen3-VL: against transformers' own model, unpruned and with HAWK inserted, and its processors."""

import json
import shutil

import numpy as np
import onnx
import pytest

from export.__main__ import main as export
from export.graphs import inventory
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError
from hawk_trt.models.qwen3_vl import interpolation
from hawk_trt.models.registry import family_name, load_family, read_config
from hawk_trt.models.vision_config import Qwen3Vision
from hawk_trt.pruning.hawk import head_scores, normalize
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
from served import ask, assert_served_as_alone
from targets import ON_CPU
from vision_tiles import assert_tiles_compute_the_same

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
import transformers

from hawk_trt.apps.parity.reference import Reference

PATCH_DIM = 1536
TOKENS = PromptTokens(image=IMAGE, video=VIDEO, vision_end=VISION_END, im_start=None, im_end=IM_END)
STEPS = 5
PROMPTS = {
    "one image": {"images": [(1, 8, 12)]},
    "several images": {"images": [(1, 8, 12), (1, 8, 12), (1, 4, 6)]},
    "video": {"videos": [(3, 8, 8)], "frame_spans": True},
    "long video": {"videos": [(7, 4, 8)], "frame_spans": True},
    "image and videos": {"images": [(1, 8, 4)], "videos": [(2, 4, 8), (2, 6, 6)], "frame_spans": True},
    "no image": {},
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
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": EOS,
        },
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
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    return save_random(model, tmp_path_factory.mktemp("qwen3_vl") / "checkpoint", 1), model


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl") / "bundle"
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
    inputs = prompt(PATCH_DIM, **PROMPTS[name])
    tokens, logits = generate(checkpoint[1], inputs, STEPS)
    result = run(pipe, inputs, 1.0)
    assert result.token_ids == tokens
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=1e-3)  # 1e-5 seen


@pytest.mark.parametrize("keep_ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", PROMPTS)
def test_it_equals_hawk_in_transformers(pipe, reference, name, keep_ratio):
    inputs = prompt(PATCH_DIM, **PROMPTS[name], seed=1)
    result = run(pipe, inputs, keep_ratio)
    expected = reference.run(reference.embed(inputs, TOKENS), PruningConfig(keep_ratio=keep_ratio), steps=STEPS)
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    assert result.token_ids == list(expected.tokens)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


def test_a_batch_equals_its_rows_one_by_one(pipe):
    rows = [prompt(PATCH_DIM, **shown, seed=number) for number, shown in enumerate(PROMPTS.values())]
    options = {"pruning": PruningConfig(keep_ratio=0.3), "max_new_tokens": STEPS, "ignore_eos": True}
    for inputs, result in zip(rows, pipe.generate_batch(rows, **options, return_logits=True), strict=True):
        alone = run(pipe, inputs, 0.3)
        assert result.token_ids == alone.token_ids
        np.testing.assert_array_equal(result.kept_indices, alone.kept_indices)
        np.testing.assert_allclose(result.logits, alone.logits, rtol=0, atol=1e-4)


def test_a_server_answers_unlike_prompts_side_by_side_as_alone(pipe):
    rows = [prompt(PATCH_DIM, **shown, seed=number) for number, shown in enumerate(PROMPTS.values())]
    jobs = [
        ask(inputs, PruningConfig((0.3, 1.0)[n % 2]), 4 + 5 * n, ignore_eos=True, return_logits=True)
        for n, inputs in enumerate([*rows, *rows])
    ]
    with Batcher(pipe) as batcher:
        assert_served_as_alone(pipe, batcher, jobs)


def test_the_vision_cache_keeps_the_features_of_every_level(bundle, pipe):
    one, two = (prompt(PATCH_DIM, images=[(1, 4, 8)] * count, seed=9) for count in (1, 2))
    two.pixel_values[: len(one.pixel_values)] = one.pixel_values
    run(pipe, one, 0.3)
    got = run(pipe, two, 0.3)
    with Pipeline.load(bundle, target=pipe.backend.target, vision_cache_mb=0) as plain:
        expected = run(plain, two, 0.3)
    assert (got.num_cached, expected.num_cached, got.token_ids) == (1, 0, expected.token_ids)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


def test_scores_equal_the_numpy_oracle_with_norms_before_the_mean(pipe, checkpoint):
    inputs = prompt(PATCH_DIM, **PROMPTS["several images"])
    trace = pipe.trace(inputs, PruningConfig(keep_ratio=0.5), [])
    language = checkpoint[1].model.language_model
    visual = inputs.input_ids == IMAGE
    embeds = language.embed_tokens(torch.from_numpy(inputs.input_ids)).detach().numpy()
    embeds[visual] = trace.visual_embeds
    layer = language.layers[0]
    attention = layer.self_attn
    norm, q_proj, k_proj, q_norm, k_norm = (
        part.weight.detach().numpy()
        for part in (layer.input_layernorm, attention.q_proj, attention.k_proj, attention.q_norm, attention.k_norm)
    )
    query = pipe.processor.layout(inputs).query_weights
    raw = head_scores(embeds, query, norm, 1e-6, (q_proj, None), (k_proj, None), 4, 2, (q_norm, k_norm))
    expected = 0.25 * normalize(raw, visual, "l2").sum(axis=0)[visual]
    np.testing.assert_allclose(trace.scores, expected, rtol=0, atol=1e-6)


def test_every_level_of_deepstack_is_added_to_the_kept_tokens(checkpoint, tmp_path):
    """Each level changes what comes out, by its own merger alone."""
    folder, model = checkpoint
    inputs = prompt(PATCH_DIM, **PROMPTS["one image"])
    logits = []
    for level in range(3):
        bias = model.model.visual.deepstack_merger_list[level].linear_fc2.bias
        kept = bias.detach().clone()
        with torch.no_grad():
            bias += 1.0
        model.save_pretrained(tmp_path / f"{level}")
        with torch.no_grad():
            bias.copy_(kept)
        assert export([str(tmp_path / f"{level}"), "--out", str(tmp_path / f"b{level}"), *IM_END_OPTION]) == 0
        with Pipeline.load(tmp_path / f"b{level}") as pipe:
            logits.append(run(pipe, inputs, 0.3).logits[0])
    assert export([str(folder), "--out", str(tmp_path / "b"), *IM_END_OPTION]) == 0
    with Pipeline.load(tmp_path / "b") as pipe:
        logits.append(run(pipe, inputs, 0.3).logits[0])
        trace = pipe.trace(inputs, PruningConfig(keep_ratio=0.3), [])
    assert all(np.abs(one - other).max() > 1e-2 for n, one in enumerate(logits) for other in logits[:n])
    with Pipeline.load(tmp_path / "b0") as pipe:
        moved = pipe.trace(inputs, PruningConfig(keep_ratio=0.3), []).hidden_states - trace.hidden_states
    visual = inputs.input_ids[trace.kept_indices] == IMAGE
    np.testing.assert_allclose(moved[visual], 1.0, atol=1e-5)
    np.testing.assert_allclose(moved[~visual], 0.0, atol=1e-6)


def test_the_vision_stage_in_tiles_of_tokens_computes_the_same(checkpoint, tmp_path, monkeypatch):
    inputs = prompt(PATCH_DIM, images=[(1, 6, 8)])
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
        inputs = prompt(PATCH_DIM, **PROMPTS["several images"])
        one, other = run(half, inputs, 1.0), run(full, inputs, 1.0)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=5e-3)
        assert np.corrcoef(one.logits[0], other.logits[0])[0, 1] > 0.999


@pytest.mark.parametrize(
    ("config", "language", "vision"),
    [
        (QWEN3_VL_4B, (2560, 9728, True), (24, 1024, 4096, 2560, [5, 11, 17])),
        (QWEN3_VL_8B, (4096, 12288, False), (27, 1152, 4304, 4096, [8, 16, 24])),
    ],
    ids=["4B", "8B"],
)
def test_the_released_configs_are_read(config, language, vision):
    assert family_name(config) == "qwen3_vl"
    sizes = read_config(config).language
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.tie_word_embeddings) == language
    assert (sizes.num_hidden_layers, sizes.num_attention_heads, sizes.num_key_value_heads) == (36, 32, 8)
    assert (sizes.head_dim, sizes.mrope_section, sizes.rope_theta) == (128, (24, 20, 20), 5e6)
    assert (sizes.qk_norm, sizes.mrope_interleaved, sizes.deepstack_levels) == (True, True, 3)
    depth, hidden, inner, out, levels = vision
    assert read_config(config).vision == Qwen3Vision(
        depth=depth, hidden_size=hidden, intermediate_size=inner, num_heads=16, in_channels=3,
        patch_size=16, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=out,
        rope_theta=10000.0, num_position_embeddings=2304, deepstack_visual_indexes=tuple(levels),
    )  # fmt: skip


def test_mixtures_of_experts_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"Qwen3VLMoeForConditionalGeneration.*mixtures of experts.*8B"):
        family_name(QWEN3_VL_8B | {"architectures": ["Qwen3VLMoeForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"head_dim": None}, "head_dim"),
        ("text_config", {"num_hidden_layers": 3}, "num_hidden_layers: got 3, expected more than the 3"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False, "mrope_section": [24, 20, 20]}}, "interleaved"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "mrope_section": [24, 20, 20]}}, "rope_type"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("vision_config", {"num_position_embeddings": 2305}, "num_position_embeddings"),
        ("vision_config", {"deepstack_visual_indexes": [8, 16, 27]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [16, 8, 24]}, "ascending"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(section, changes, words):
    config = QWEN3_VL_8B | {section: QWEN3_VL_8B[section] | changes}
    with pytest.raises(CheckpointError, match=words):
        read_config(config)


@pytest.mark.parametrize("grid", [(2, 2), (2, 96), (10, 6), (48, 48), (62, 94), (130, 4)], ids=str)
def test_positions_are_interpolated_as_transformers_does(grid):
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    index, weight = interpolation(*grid, 2, 48)
    theirs = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), 48, align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(index, theirs[0].numpy())
    np.testing.assert_array_equal(weight, theirs[1].numpy())


@pytest.mark.parametrize("config", [QWEN3_VL_4B, QWEN3_VL_8B], ids=["4B", "8B"])
def test_the_released_sizes_have_the_tensors_that_the_exporter_expects(config):
    model = read_config(config)
    expected = inventory(model.language, model.vision)
    assert expected == released_shapes(config, transformers.Qwen3VLForConditionalGeneration)


SIZES = [(28, 28), (57, 91), (224, 224), (333, 500), (768, 900), (30, 900), (999, 1500)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_equal_those_of_transformers(size):
    check_patches(load_family(read_config(QWEN3_VL_8B).vision), PREPROCESSOR, size)


def test_both_preprocessors_are_found_where_transformers_5_writes_them(checkpoint, tmp_path):
    video = PREPROCESSOR | {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    shutil.copytree(checkpoint[0], tmp_path / "model")
    whole = {"image_processor": PREPROCESSOR, "video_processor": video}
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(whole))
    assert export([str(tmp_path / "model"), "--out", str(tmp_path / "bundle")]) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    for name, expected in (("preprocessor_config.json", PREPROCESSOR), ("video_preprocessor_config.json", video)):
        assert json.loads(bundle.read_text(name)) == expected


def test_each_frame_of_a_video_is_placed_as_an_image(pipe):
    inputs = prompt(PATCH_DIM, **PROMPTS["video"])
    visual = inputs.input_ids == VIDEO
    frames = pipe.processor.layout(inputs).position_ids[:, visual].reshape(3, 3, 4, 4)
    starts = frames[0, :, 0, 0]
    assert np.all(np.diff(starts) == 4 + 4)  # the frame's height and width, then vision_end, two words, vision_start
    np.testing.assert_array_equal(frames[0], np.broadcast_to(starts[:, None, None], (3, 4, 4)))
    np.testing.assert_array_equal(frames[1] - starts[:, None, None], np.tile(np.arange(4)[:, None], (3, 1, 4)))
