"""Activations beyond float16's 65,504, and what is said when a value is not finite."""

import dataclasses

import numpy as np
import pytest
from checkpoints import TINY, make_checkpoint, random_tensors

from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.errors import BackendError
from hawk_trt.stages import PROFILES

SIZES = dataclasses.replace(TINY, layers=4)
FLOAT16_MAX = 65504.0


def bundle(folder, change, dtype):
    tensors = random_tensors(SIZES, seed=4)
    for name, factor in change.items():
        for key in [key for key in tensors if name in key]:
            tensors[key] = tensors[key] * np.float32(factor)
    checkpoint = make_checkpoint(folder / "checkpoint", tensors, sizes=SIZES)
    assert export([str(checkpoint), "--out", str(folder / dtype), "--dtype", dtype]) == 0
    return folder / dtype


def image_prompt(pipe, seed=0):
    special = pipe.bundle.manifest.special_tokens
    rng = np.random.default_rng(seed)
    ids = [3, special.vision_start, *[special.image] * 16, special.vision_end, 7, 8, 9, 10]
    pixels = rng.normal(size=(64, 1176)).astype(np.float32)
    return ModelInputs(input_ids=ids, pixel_values=pixels, image_grid_thw=[[1, 8, 8]])


def answers(folder, profile):
    with Pipeline.load(folder, profile=profile) as pipe:
        inputs = image_prompt(pipe)
        options = {"pruning": PruningConfig(keep_ratio=0.5), "max_new_tokens": 6, "ignore_eos": True}
        result = pipe.generate(inputs, **options, return_logits=True)
        return result, pipe.trace(inputs, options["pruning"], result.token_ids[:-1])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("part", ["language_model.layers.0.mlp", "language_model.layers.2.mlp", "visual.blocks.0.mlp"])
def test_float16_holds_where_activations_pass_its_range(tmp_path, part, profile):
    change = {f"{part}.gate_proj": 400.0, f"{part}.up_proj": 400.0}
    half, half_trace = answers(bundle(tmp_path / "half", change, "float16"), profile)
    full, full_trace = answers(bundle(tmp_path / "full", change, "float32"), profile)
    if "layers.0" in part:
        assert np.abs(full_trace.hidden_states).max() > FLOAT16_MAX
        assert np.isfinite(half_trace.hidden_states).all()
    assert half.token_ids == full.token_ids
    np.testing.assert_array_equal(half.kept_indices, full.kept_indices)
    for one, other in zip(half.logits, full.logits, strict=True):
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        assert cosine > 0.9995
        assert np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(1.0, abs=5e-3)


def test_the_inner_values_of_the_test_do_pass_the_range():
    """Else the test above would pass whatever the emission."""
    rng = np.random.default_rng(0)
    tensors = random_tensors(SIZES, seed=4)
    x = rng.normal(size=(50, SIZES.hidden_size))
    x /= np.sqrt((x * x).mean(axis=1, keepdims=True))
    mlp = "language_model.layers.2.mlp"
    gate, up = (400.0 * x @ tensors[f"{mlp}.{name}_proj.weight"].T for name in ("gate", "up"))
    product = gate / (1 + np.exp(-np.clip(gate, -50, 50))) * up
    assert np.abs(gate).max() < FLOAT16_MAX
    assert np.abs(product).max() > FLOAT16_MAX
    assert np.abs(product @ tensors[f"{mlp}.down_proj.weight"].T).max() > FLOAT16_MAX


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("visual.merger.mlp.2.bias", "in vision's visual_embeds"),
        ("language_model.layers.0.mlp.down_proj.weight", "in first_layer: the output of layer 0"),
        ("language_model.layers.2.self_attn.v_proj.bias", "in decoder, layer 2"),
        ("language_model.layers.2.mlp.down_proj.weight", "in decoder, layer 3: layer 2's output"),
        ("lm_head.weight", "the norm or lm_head of decoder"),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_stage_and_layer(tmp_path, tensor, where, profile):
    folder = bundle(tmp_path, {tensor: np.nan}, "float32")
    with Pipeline.load(folder, profile=profile) as pipe, pytest.raises(BackendError, match=where) as error:
        pipe.generate(image_prompt(pipe), pruning=PruningConfig(keep_ratio=0.5), max_new_tokens=3)
    assert "--dtype bfloat16 or float32" in str(error.value)
