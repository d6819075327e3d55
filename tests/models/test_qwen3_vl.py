"""What Qwen3-VL has of its own: norms of queries and keys, DeepStack, a table of positions, videos told as text."""

import json
import shutil

import numpy as np
import pytest

from export.__main__ import main as export
from export.architectures import family_name, read_config
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError
from hawk_trt.models.qwen3_vl import interpolation
from hawk_trt.models.vision_config import Qwen3Vision
from hawk_trt.pruning.hawk import head_scores, normalize
from hawk_trt.runtime.trace import traced
from qwen import PREPROCESSOR, QWEN3_VL_4B, QWEN3_VL_8B, QWENS, run
from random_models import (
    IM_END_OPTION,
    IMAGE,
    VIDEO,
    prompt,
)
from served import ask, assert_served_as_alone
from targets import ON_CPU

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch

PROMPTS, PATCH_DIM = QWENS["qwen3_vl"].prompts, QWENS["qwen3_vl"].patch_dim


@pytest.fixture(scope="module")
def qwen(random_qwen):
    return random_qwen("qwen3_vl")


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, qwen):
    return qwen.pipe(request.param)


def test_a_server_answers_unlike_prompts_side_by_side_as_alone(pipe):
    rows = [prompt(PATCH_DIM, **shown, seed=number) for number, shown in enumerate(PROMPTS.values())]
    jobs = [
        ask(inputs, PruningConfig((0.3, 1.0)[n % 2]), 4 + 5 * n, ignore_eos=True, return_logits=True)
        for n, inputs in enumerate([*rows, *rows])
    ]
    with Batcher(pipe) as batcher:
        assert_served_as_alone(pipe, batcher, jobs)


def test_the_vision_cache_keeps_the_features_of_every_level(qwen, pipe):
    one, two = (prompt(PATCH_DIM, images=[(1, 4, 8)] * count, seed=9) for count in (1, 2))
    two.pixel_values[: len(one.pixel_values)] = one.pixel_values
    run(pipe, one, 0.3)
    got = run(pipe, two, 0.3)
    with Pipeline.load(qwen.bundle, target=pipe.backend.target, vision_cache_mb=0, threads=1) as plain:
        expected = run(plain, two, 0.3)
    assert (got.num_cached, expected.num_cached, got.token_ids) == (1, 0, expected.token_ids)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


def test_scores_equal_the_numpy_oracle_with_norms_before_the_mean(pipe, qwen):
    inputs = prompt(PATCH_DIM, **PROMPTS["several images"])
    trace = traced(pipe, inputs, PruningConfig(keep_ratio=0.5), [])
    language = qwen.model.model.language_model
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


def test_every_level_of_deepstack_is_added_to_the_kept_tokens(qwen, tmp_path):
    """Each level changes what comes out, by its own merger alone."""
    model = qwen.model
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
        with Pipeline.load(tmp_path / f"b{level}", threads=1) as pipe:
            logits.append(run(pipe, inputs, 0.3).logits[0])
    with Pipeline.load(qwen.bundle, threads=1) as pipe:
        logits.append(run(pipe, inputs, 0.3).logits[0])
        trace = traced(pipe, inputs, PruningConfig(keep_ratio=0.3), [])
    assert all(np.abs(one - other).max() > 1e-2 for n, one in enumerate(logits) for other in logits[:n])
    with Pipeline.load(tmp_path / "b0", threads=1) as pipe:
        moved = traced(pipe, inputs, PruningConfig(keep_ratio=0.3), []).hidden_states - trace.hidden_states
    visual = inputs.input_ids[trace.kept_indices] == IMAGE
    np.testing.assert_allclose(moved[visual], 1.0, atol=1e-5)
    np.testing.assert_allclose(moved[~visual], 0.0, atol=1e-6)


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


def test_both_preprocessors_are_found_where_transformers_5_writes_them(qwen, tmp_path):
    video = PREPROCESSOR | {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    shutil.copytree(qwen.checkpoint, tmp_path / "model")
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
