"""Random weights of released shapes: sizes, seeds, the export of them, and that transformers reads the same configs."""

import dataclasses
import json

import numpy as np
import pytest

import export.__main__ as command
from export.architectures import read_config
from export.graphs import inventory
from export.random_checkpoint import random_checkpoint
from export.real_shapes import SHAPES, shape_config
from export.writer import ExportOptions
from export.writer import export as write
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main
from hawk_trt.errors import InvalidInput

BILLIONS = {
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.5,
    "qwen2.5-vl-72b": 73.4,
    "qwen3-vl-2b": 2.13,
    "qwen3.5-0.8b": 0.853,
    "qwen3.5-2b": 2.21,
    "qwen3.5-4b": 4.54,
    "qwen3.5-9b": 9.41,
    "qwen3.5-27b": 27.36,
}


def small(layers=3):
    """The 3B's config with every size cut down."""
    config = shape_config("qwen2.5-vl-3b", layers, 2)
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "num_attention_heads": 2}
    config["text_config"] |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    ids = ("vision_start", "vision_end", "image", "video", "eos")
    return config | {f"{name}_token_id": 310 + number for number, name in enumerate(ids)}


def values(checkpoint, name):
    return np.concatenate([block.copy() for block in checkpoint.tensor(name).blocks()])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_released_models_number_of_weights(shape):
    config = shape_config(shape)
    model = read_config(config)
    shapes = inventory(model.language, model.vision)
    assert sum(int(np.prod(size)) for size in shapes.values()) / 1e9 == pytest.approx(BILLIONS[shape], rel=2e-3)


def test_fewer_layers_end_with_a_vision_layer_that_sees_whole_frames():
    config = shape_config("qwen2.5-vl-7b", 2, 10)
    assert config["text_config"]["num_hidden_layers"] == 2
    assert config["vision_config"]["fullatt_block_indexes"] == [7, 9]
    assert shape_config("qwen2.5-vl-7b")["vision_config"]["fullatt_block_indexes"] == [7, 15, 23, 31]
    assert shape_config("qwen3-vl-2b", 4, 12)["vision_config"]["deepstack_visual_indexes"] == [5, 11]
    assert shape_config("qwen3-vl-2b", 2, 2)["vision_config"]["deepstack_visual_indexes"] == [0]
    hybrid = read_config(shape_config("qwen3.5-2b", 9, 2))
    assert hybrid.language.layer_types.count("full_attention") == 2 and len(hybrid.language.layer_types) == 9
    assert hybrid.vision.deepstack_visual_indexes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qwen2.5-vl-9b",), "shape: got 'qwen2.5-vl-9b', expected one of qwen2.5-vl-3b"),
        (("qwen2.5-vl-3b", 1), "layers: got 1, expected 2 to 36"),
        (("qwen2.5-vl-3b", 2, 33), "vision-layers: got 33, expected 1 to 32"),
        (("qwen3.5-0.8b", 7), "layers: got 7, expected 8 to 24"),
    ],
)
def test_shapes_that_are_none_are_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        shape_config(*arguments)


def test_a_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder in folders:
        folder.mkdir()
    one, same, other = (
        random_checkpoint(folder, small(), seed) for folder, seed in zip(folders, (0, 0, 1), strict=True)
    )
    name = "language_model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(values(one, name), values(same, name))
    assert np.abs(values(one, name) - values(other, name)).mean() > 0.1
    assert values(one, name).std() == pytest.approx(1 / 8, rel=0.05)  # 1 / sqrt(hidden)
    assert not np.array_equal(values(one, name), values(one, name.replace("1.mlp", "0.mlp")))
    assert values(one, "language_model.norm.weight").mean() == pytest.approx(1, abs=0.01)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_the_bundle_answers_and_is_measured_as_any_other(tmp_path, capsys):
    bundle = write(random_checkpoint(tmp_path, small()), tmp_path / "b", ExportOptions(im_end_token_id=314))
    special = bundle.manifest.special_tokens
    ids = [7, special.vision_start, *[special.image] * 16, special.vision_end, 8, 9]
    pixels = np.random.default_rng(0).standard_normal((64, 1176), np.float32)
    inputs = ModelInputs(ids, None, pixels, [[1, 8, 8]])
    with Pipeline.load(tmp_path / "b", threads=1) as pipe:
        result = pipe.generate(inputs, pruning=PruningConfig(0.25), max_new_tokens=4, return_logits=True)
    assert result.num_kept == 4
    assert np.isfinite(result.logits).all()
    assert 0.1 < result.logits.std() < 10
    options = ["--sides", "112", "--keep-ratios", "1,0.25", "--repeats", "1", "--warmup", "0", "--max-new-tokens", "2"]
    assert main(["bench", str(tmp_path / "b"), *options, "--json"]) == 0
    assert [row["num_kept"] for row in json.loads(capsys.readouterr().out)["rows"]] == [16, 4]


def test_the_command_makes_it_on_the_spot_and_again_only_if_asked_for_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "shape_config", lambda _shape, layers, _vision_layers: small(layers))
    arguments = [
        "--shape",
        "qwen2.5-vl-3b",
        "--layers",
        "2",
        "--out",
        str(tmp_path / "b"),
        "--dtype",
        "float16",
        "--json",
    ]
    for up_to_date in (False, True):
        assert command.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["up_to_date"] is up_to_date
    arguments[3] = "3"
    assert command.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is False
    with Pipeline.load(tmp_path / "b", threads=1) as pipe:
        manifest = pipe.bundle.manifest
    assert (manifest.source.name, manifest.special_tokens.im_end) == ("qwen2.5-vl-3b, random weights", 314)
    assert manifest.language.num_hidden_layers == 3


@pytest.mark.parametrize(
    "arguments",
    [[], ["CHECKPOINT", "--shape", "qwen2.5-vl-3b"], ["--shape", "qwen2.5-vl-3b", "--link"], ["X", "--layers", "2"]],
)
def test_wrong_usage_is_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--out", str(tmp_path / "b")])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_transformers_reads_the_same_sizes():
    transformers = pytest.importorskip("transformers")
    for shape in SHAPES:
        ours = shape_config(shape)
        kinds = {"qwen3-": transformers.Qwen3VLConfig, "qwen3.5": transformers.Qwen3_5Config}
        config_class = next(
            (kind for start, kind in kinds.items() if shape.startswith(start)), transformers.Qwen2_5_VLConfig
        )
        theirs = config_class.from_dict(ours)
        language = read_config(ours).language
        for name in dataclasses.asdict(language).keys() & {"hidden_size", "num_key_value_heads", "vocab_size"}:
            assert getattr(theirs.text_config, name) == getattr(language, name)
        if language.layer_types:
            assert tuple(theirs.text_config.layer_types) == language.layer_types
        assert theirs.vision_config.out_hidden_size == language.hidden_size
        assert theirs.tie_word_embeddings == language.tie_word_embeddings
