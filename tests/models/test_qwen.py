"""The Qwen line against transformers: its own models, unpruned and with HAWK inserted, and its processors."""

import json
from functools import cache

import numpy as np
import onnx
import pytest

from export.__main__ import main as export
from export.architectures import read_config
from export.graphs import inventory
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.inputs.images import load_image
from hawk_trt.models import load_family
from hawk_trt.stages import DTYPES
from image_processors import check_patches
from pictures import NATURAL
from qwen import LONG_VIDEO, QWENS, STEPS, TOKENS, run
from random_models import IM_END_OPTION, generate, prompt, released_shapes
from targets import ON_CPU
from vision_tiles import assert_tiles_compute_the_same

CASES = [(family, name) for family, qwen in QWENS.items() for name in qwen.prompts]
RELEASED = [pytest.param(qwen, config, id=size) for qwen in QWENS.values() for size, config in qwen.released.items()]
SIZES = [(28, 28), (57, 91), (224, 224), (333, 500), (768, 900), (30, 900), (999, 1500)]


@pytest.fixture(scope="module", params=QWENS)
def qwen(request, random_qwen):
    return random_qwen(request.param)


@pytest.fixture(params=(0, 1))
def pipe(request, qwen):
    return qwen.pipe(ON_CPU[request.param])


@cache  # for both targets
def generated(qwen, name):
    """A prompt, and what transformers' own generate makes of it."""
    inputs = prompt(qwen.family.patch_dim, **qwen.family.prompts[name])
    return inputs, *generate(qwen.model, inputs, STEPS)


@cache
def with_hawk(qwen, name, keep_ratio):
    """A prompt, and what transformers with HAWK inserted makes of it."""
    inputs = prompt(qwen.family.patch_dim, **({"long video": LONG_VIDEO} | qwen.family.prompts)[name], seed=1)
    embedded = qwen.reference.embed(inputs, TOKENS)
    return inputs, qwen.reference.run(embedded, PruningConfig(keep_ratio=keep_ratio), steps=STEPS)


@pytest.mark.parametrize(("qwen", "name"), CASES, indirect=["qwen"])
def test_unpruned_it_generates_what_transformers_generates(pipe, qwen, name):
    inputs, tokens, logits = generated(qwen, name)
    result = run(pipe, inputs, 1.0)
    assert result.token_ids == tokens
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=1e-3)  # 1e-5 seen


@pytest.mark.parametrize("keep_ratio", [1.0, 0.3])
@pytest.mark.parametrize(("qwen", "name"), [*CASES, ("qwen2_vl", "long video")], indirect=["qwen"])
def test_it_equals_hawk_in_transformers(pipe, qwen, name, keep_ratio):
    inputs, expected = with_hawk(qwen, name, keep_ratio)
    result = run(pipe, inputs, keep_ratio)
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    assert result.token_ids == list(expected.tokens)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


def test_a_batch_equals_its_rows_one_by_one(pipe, qwen):
    prompts = enumerate(qwen.family.prompts.values())
    rows = [prompt(qwen.family.patch_dim, **shown, seed=number) for number, shown in prompts]
    options = {"pruning": PruningConfig(keep_ratio=0.3), "max_new_tokens": STEPS, "ignore_eos": True}
    for inputs, result in zip(rows, pipe.generate_batch(rows, **options, return_logits=True), strict=True):
        alone = run(pipe, inputs, 0.3)
        assert result.token_ids == alone.token_ids
        np.testing.assert_array_equal(result.kept_indices, alone.kept_indices)
        np.testing.assert_allclose(result.logits, alone.logits, rtol=0, atol=1e-4)


def test_the_vision_stage_in_tiles_of_tokens_computes_the_same(qwen, tmp_path, monkeypatch):
    inputs = prompt(qwen.family.patch_dim, images=[(1, 6, 8)])
    assert_tiles_compute_the_same(qwen.checkpoint, tmp_path / "tiles", inputs, monkeypatch, *IM_END_OPTION)


def test_the_parity_command_agrees(qwen, capsys):
    command = ["parity", str(qwen.bundle), "--checkpoint", str(qwen.checkpoint), "--keep-ratio", "0.3", "--steps", "2"]
    capsys.readouterr()  # of the export
    assert hawk_trt([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_every_graph_passes_the_checker_and_strict_shape_inference(qwen, tmp_path):
    for dtype in DTYPES:
        assert export([str(qwen.checkpoint), "--out", str(tmp_path / dtype), "--dtype", dtype, *IM_END_OPTION]) == 0
    files = sorted(tmp_path.glob("*/*.onnx"))
    assert len(files) == 2 * 12 + 9  # bfloat16 without cpu
    for file in files:
        onnx.checker.check_model(file, full_check=True)
        # onnx does not know the shapes that ONNX Runtime's own operators give
        strict = "com.microsoft" not in {
            domain.domain for domain in onnx.load(file, load_external_data=False).opset_import
        }
        onnx.shape_inference.infer_shapes_path(
            file, tmp_path / "inferred.onnx", check_type=True, strict_mode=strict, data_prop=True
        )
    with Pipeline.load(tmp_path / "float16", threads=1) as half, Pipeline.load(tmp_path / "float32", threads=1) as full:
        inputs = prompt(qwen.family.patch_dim, **qwen.family.prompts["several images"])
        one, other = run(half, inputs, 1.0), run(full, inputs, 1.0)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=5e-3)
        assert np.corrcoef(one.logits[0], other.logits[0])[0, 1] > 0.999


@pytest.mark.parametrize(("family", "config"), RELEASED)
def test_the_released_sizes_have_the_tensors_that_the_exporter_expects(family, config):
    model = read_config(config)
    expected = inventory(model.language, model.vision)
    assert expected == released_shapes(config, type(family.make()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", QWENS.values(), ids=QWENS)
def test_patches_equal_those_of_transformers(family, size):
    config = list(family.released.values())[-1]
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    check_patches(load_family(read_config(config).vision), family.preprocessor, image)


@pytest.mark.parametrize("path", NATURAL, ids=lambda path: path.name)
@pytest.mark.parametrize("family", QWENS.values(), ids=QWENS)
def test_patches_of_photographs_and_of_a_page_equal_those_of_transformers(family, path):
    config = list(family.released.values())[-1]
    from transformers import image_utils

    image = load_image(path)
    np.testing.assert_array_equal(image, np.asarray(image_utils.load_image(str(path))))
    check_patches(load_family(read_config(config).vision), family.preprocessor, image)
