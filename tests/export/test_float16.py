"""Activations beyond float16's 65,504, and what is said when a value is not finite."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from checkpoints import TINY, make_checkpoint, random_tensors
from engines.prepare import prepare
from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.bundle import Bundle
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import collate
from hawk_trt.models.family import Patches
from targets import ON_CPU

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


def stage_feeds(pipe, stage, dtype):
    """Feeds of a stage's portable graph over one image prompt, in float32 and rounded to the dtype."""
    inputs = image_prompt(pipe)
    rng = np.random.default_rng(5)
    language = pipe.bundle.manifest.language
    empty = np.zeros((1, language.num_key_value_heads, 0, language.head_dim), np.float32)
    layout = pipe.processor.layout(inputs)
    prefill = collate([layout], [8], [None], np.full(SIZES.heads, 0.25, np.float32))
    if stage == "vision":
        patches = Patches(inputs.pixel_values, np.array(inputs.image_grid_thw))
        feeds = next(pipe.family.vision_feeds(patches, 10_000))
    elif stage == "first_layer":
        feeds = {
            "text_embeds": pipe.bundle.embedding_table()[prefill.text_ids].astype(np.float32),
            "visual_embeds": rng.normal(size=(16, SIZES.hidden_size)).astype(np.float32),
            "slots": np.zeros(prefill.num_kept_total, np.int64),
            **{name: getattr(prefill, name) for name in ("source_rows", "position_ids", "query_weights")},
            **{name: getattr(prefill, name) for name in ("select_bias", "head_weights", "kv_start")},
        }
    else:
        feeds = {
            "hidden_states": rng.normal(size=(1, 6, SIZES.hidden_size)).astype(np.float32),
            "kept_position_ids": np.arange(6).reshape(1, 1, 6).repeat(3, 0),
            "kv_start": np.zeros(1, np.int64),
        }
    entries = pipe.bundle.manifest.graph(stage, "portable").inputs
    caches = {entry.name: empty for entry in entries if entry.name.startswith("past_")}
    return {
        entry.name: (feeds | caches)[entry.name].astype(np.float16 if entry.dtype == dtype else entry.dtype)
        for entry in entries
    }


@pytest.mark.parametrize(
    ("stage", "part", "output"),
    [
        ("vision", "visual.blocks.0.mlp", "visual_embeds"),
        ("first_layer", "language_model.layers.0.mlp", "hidden_states"),
        ("decoder", "language_model.layers.2.mlp", "logits"),
    ],
)
def test_float16_holds_where_activations_pass_its_range(tmp_path, stage, part, output):
    change = {f"{part}.gate_proj": 400.0, f"{part}.up_proj": 400.0}
    half = bundle(tmp_path / "half", change, "float16")
    full = bundle(tmp_path / "full", change, "float32")
    # as TensorRT gets it, and not in ONNX Runtime, whose CPU provider computes float16 in float32
    graph = onnx.load_from_string(prepare(Bundle.load(half), stage, "portable", max_context=64, plugin=False).content)
    onnx.external_data_helper.load_external_data_for_model(graph, str(half))
    # the evaluator's own sigmoid overflows in the branch that it does not take
    with Pipeline.load(half, target="portable", threads=1) as pipe, np.errstate(over="ignore", invalid="ignore"):
        got = ReferenceEvaluator(graph).run([output], stage_feeds(pipe, stage, "float16"))[0].astype(np.float32)
    with Pipeline.load(full, target="portable", threads=1) as pipe:
        session = ort.InferenceSession(full / f"{stage}.portable.onnx")
        expected = session.run([output], stage_feeds(pipe, stage, None))[0]
    if output == "hidden_states":
        assert np.abs(expected).max() > FLOAT16_MAX
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * np.abs(expected).max())


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


@pytest.mark.parametrize("target", ON_CPU)
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
def test_a_value_that_is_not_finite_is_named_with_stage_and_layer(tmp_path, tensor, where, target):
    folder = bundle(tmp_path, {tensor: np.nan}, "float32")
    with Pipeline.load(folder, target=target, threads=1) as pipe, pytest.raises(BackendError, match=where) as error:
        pipe.generate(image_prompt(pipe), pruning=PruningConfig(keep_ratio=0.5), max_new_tokens=3)
    assert "--dtype bfloat16 or float32" in str(error.value)
