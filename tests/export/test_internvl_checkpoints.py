"""The makes in which InternVL's checkpoints come: transformers' own, those of 4.52 to 5.0, and the original."""

import hashlib
import json

import numpy as np
import pytest

import internvl
from export.__main__ import main as export
from hawk_trt import Pipeline
from hawk_trt.apps.cli.main import main as hawk
from hawk_trt.errors import CheckpointError
from internvl import CHECKPOINTS, IM_END
from targets import ON_CPU

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return internvl.export_all(tmp_path_factory.mktemp("internvl"))


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_all_makes_and_generations_of_names_give_the_same_graphs_and_weights(folder, tmp_path, name, prefix):
    checkpoint = internvl.save_original(folder / name, tmp_path / "original")
    if prefix:  # as transformers 4.52 to 5.0 saved it
        checkpoint = tmp_path / "renamed"
        checkpoint.mkdir()
        for path in (folder / name).iterdir():
            (checkpoint / path.name).write_bytes(path.read_bytes())
        weights = internvl.load_file(folder / name / "model.safetensors")
        renamed = {
            key.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head"): t
            for key, t in weights.items()
        }
        renamed = {key if key.startswith("lm_head") else prefix + key: t for key, t in renamed.items()}
        internvl.save_file(renamed, checkpoint / "model.safetensors", {"format": "pt"})
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle")]) == 0
    digests = []
    for bundle in (folder / f"{name}.bundle", tmp_path / "bundle"):
        files = sorted(path for path in bundle.iterdir() if path.suffix in (".onnx", ".data"))
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert len(digests[0]) == 4 * 3 + 4
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["layer_norm", "qwen3"])
@pytest.mark.parametrize("target", ON_CPU)
def test_an_original_checkpoint_answers_prompts_as_the_converted_one(folder, tmp_path, name, target):
    checkpoint = internvl.save_original(folder / name, tmp_path / "original")
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle"), "--link"]) == 0
    image = np.random.default_rng(0).integers(0, 256, (160, 100, 3), dtype=np.uint8)
    asked = {"images": [image], "max_new_tokens": 5, "ignore_eos": True, "return_logits": True}
    results = []
    for bundle in (folder / f"{name}.bundle", tmp_path / "bundle"):
        with Pipeline.load(bundle, target=target, threads=1) as pipe:
            assert IM_END in pipe.bundle.manifest.special_tokens.eos
            results.append(pipe.generate("What is it?", **asked))
    assert results[0].token_ids == results[1].token_ids
    np.testing.assert_allclose(results[0].logits, results[1].logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["rms_norm", "qwen3"])
def test_parity_reads_an_original_checkpoint(folder, tmp_path, name, capsys):
    checkpoint = internvl.save_original(folder / name, tmp_path / "original")
    asked = ["parity", str(folder / f"{name}.bundle"), "--keep-ratio", "0.3", "--steps", "3", "--json"]
    assert hawk([*asked, "--checkpoint", str(checkpoint)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and {"two images", "text only"} <= {case["name"] for case in report["cases"]}


def test_a_fused_tensor_that_cannot_be_cut_is_an_error_that_names_it(folder, tmp_path):
    checkpoint = internvl.save_original(folder / "layer_norm", tmp_path / "original")
    weights = internvl.load_file(checkpoint / "model.safetensors")
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    internvl.save_file({**weights, name: weights[name][:-1]}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {name}: shape \[95, 32\], expected rows in 3 equal parts"):
        from export.checkpoint import Checkpoint

        Checkpoint.open(checkpoint)
