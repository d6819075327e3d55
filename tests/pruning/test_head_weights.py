"""Head weights at export: the released ones, and a file's."""

import json

import numpy as np
import pytest

from checkpoints import make_checkpoint, make_sparse_checkpoint, write_json
from export.__main__ import main
from export.head_weights import default_head_weights
from hawk_trt.bundle import HeadWeights, read_manifest
from hawk_trt.models.registry import family_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("head-weights") / "model")


def test_the_released_head_weights_belong_to_the_7b_alone(tmp_path, repository):
    folder = make_sparse_checkpoint(tmp_path / "model")
    parsed = json.loads((folder / "config.json").read_text())
    family = family_of(parsed)
    weights = default_head_weights(family.name, family.read_config(parsed).language)
    raw = json.loads((repository / "hawk_trt/data/head_weights/qwen2.5-vl-7b.json").read_text())["raw"]
    assert len(weights.values) == 28
    assert "HAWK" in weights.source
    np.testing.assert_allclose(weights.values, np.array(raw) / 1.2616, rtol=1e-12)
    np.testing.assert_allclose(sum(weights.values), 1.0, rtol=1e-12)
    smaller = family.read_config(parsed | {"num_hidden_layers": 27}).language
    assert default_head_weights(family.name, smaller).values == (1 / 28,) * 28


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2, 3]", "got 3 values, expected 4"),
        ("[0, 0, 0, 0]", "all are 0"),
        ("[1, 2, 3, NaN]", "finite"),
        ("[1, 2, 3, -1]", "at least 0"),
        ('["a", 1, 2, 3]', "numbers"),
        ("{}", "no list of numbers"),
        ("[1,", "not JSON"),
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
