"""Head weights at export: the released ones, and a file's."""

import json
from dataclasses import replace

import numpy as np
import pytest

from checkpoints import make_checkpoint, make_sparse_checkpoint, write_json
from export.__main__ import main
from export.architectures import family_name, read_config
from export.head_weights import default_head_weights
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.bundle import Bundle, HeadWeights, read_manifest
from hawk_trt.errors import BundleError, InvalidInput


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("head-weights") / "model")


def test_the_released_head_weights_belong_to_the_7b_alone(tmp_path, repository):
    folder = make_sparse_checkpoint(tmp_path / "model")
    parsed = json.loads((folder / "config.json").read_text())
    weights = default_head_weights(family_name(parsed), read_config(parsed).language)
    raw = json.loads((repository / "hawk_trt/data/head_weights/qwen2.5-vl-7b.json").read_text())["raw"]
    assert len(weights.values) == 28
    assert "HAWK" in weights.source
    np.testing.assert_allclose(weights.values, np.array(raw) / 1.2616, rtol=1e-12)
    np.testing.assert_allclose(sum(weights.values), 1.0, rtol=1e-12)
    smaller = read_config(parsed | {"num_hidden_layers": 27}).language
    assert default_head_weights(family_name(parsed), smaller).values == (1 / 28,) * 28


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2, 3]", "got 3 values, expected 4"),
        ("[0, 0, 0, 0]", "all are 0"),
        ("[1, 2, 3, NaN]", "JSON is malformed"),
        ("[1, 2, 3, -1]", "at least 0"),
        ('["a", 1, 2, 3]', "numbers"),
        ('["1", 1, 2, 3]', "numbers"),
        ("[true, 1, 2, 3]", "numbers"),
        ("[1e39, 1, 2, 3]", "the largest is 1e+39, expected one from 1e-30 to 1e+30"),
        ("[0, 1e-46, 0, 0]", "the largest is 1e-46"),
        (f"[1{'0' * 400}, 1, 2, 3]", "numbers"),
        (f"[1{'0' * 9000}, 1, 2, 3]", "Integer value out of range"),
        ("{}", "no list of numbers"),
        ("[1,", "Input data was truncated"),
    ],
)
def test_wrong_head_weights_are_refused(tmp_path, checkpoint, capsys, content, message):
    path = tmp_path / "weights.json"
    path.write_text(content)
    assert main([str(checkpoint), "--out", str(tmp_path / "out"), "--head-weights", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_head_weights_from_a_file_are_stored_with_their_source(tmp_path, checkpoint):
    path = tmp_path / "weights.json"
    write_json(path, {"values": [1, 2, 3, 4], "source": "calibrated on mine"})
    assert main([str(checkpoint), "--out", str(tmp_path / "out"), "--head-weights", str(path)]) == 0
    assert read_manifest(tmp_path / "out").head_weights == HeadWeights((1.0, 2.0, 3.0, 4.0), "calibrated on mine")


@pytest.mark.parametrize("weight", [1.001e30, 3e38, 3.5e38, 1e39, 1e308, 1e-31, 1e-46])
def test_weights_that_scores_in_float32_cannot_hold_are_refused_wherever_they_come_from(tiny_bundle, tmp_path, weight):
    with pytest.raises(InvalidInput, match="head_weights: the largest is"):
        PruningConfig(head_weights=(weight, *[0.0] * 7))
    bundle = Bundle.load(tiny_bundle)
    manifest = replace(bundle.manifest, head_weights=HeadWeights((weight, *[0.0] * 7), "mine"))
    with pytest.raises(BundleError, match="damaged, head_weights: the largest is"):
        Bundle(bundle.folder, manifest).check()
    (tmp_path / "weights.json").write_text(f"[{weight}, 0, 0, 0, 0, 0, 0, 0]")
    eval_ = ["eval", str(tiny_bundle), "--out", str(tmp_path / "out"), "--head-weights", str(tmp_path / "weights.json")]
    assert hawk_trt(eval_) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [1e-30, 1.0, 1e30])
def test_the_largest_and_smallest_weights_keep_every_text_token(tiny_bundle, weight):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        picture = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
        inputs = pipe.prepare("What colour is the heart?", [picture])
        text = np.flatnonzero(pipe.processor.layout(inputs).visual_rows < 0)
        pruning = PruningConfig(keep_ratio=0.1, head_weights=(weight, *[0.0] * 7))
        result = pipe.generate(inputs, pruning=pruning, max_new_tokens=1)
        assert set(text) <= set(result.kept_indices) and result.num_kept == 7 and np.isfinite(result.scores).all()
