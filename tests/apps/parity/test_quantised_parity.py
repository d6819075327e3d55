"""hawk-trt parity on quantised checkpoints, none of whose packages is installed: our reader dequantises for PyTorch."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from export.__main__ import main as export_main
from hawk_trt.apps.cli.main import main
from hawk_trt.errors import CheckpointError
from quantised_checkpoints import WRITERS, write_quantised

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hawk_trt.apps.cli.torch_model import load_reference  # noqa: E402


def load(folder):
    return load_reference(folder, head_weights=(0.25,) * 4, normalization="l2", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["awq-32", "gptq-desc-act", "packed-int4-rows", "float8-blocks", "float8-tensor"])
def test_pytorch_gets_the_floats_that_the_integers_stand_for(tmp_path, name):
    quantised, plain = (load(folder).language.state_dict() for folder in write_quantised(tmp_path, WRITERS[name]))
    assert quantised.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in quantised.items())


@pytest.mark.usefixtures("float_activations")
def test_a_bundle_of_a_quantised_checkpoint_agrees_with_it(tmp_path, capsys):
    quantised, _ = write_quantised(tmp_path, WRITERS["awq-32"])
    ends = ["--im-end-token-id", "301", "--vision-end-token-id", "316"]
    assert export_main([str(quantised), "--out", str(tmp_path / "out"), "--target", "cpu", *ends]) == 0
    capsys.readouterr()
    options = ["--keep-ratio", "0.3", "--steps", "3", "--json"]
    assert main(["parity", str(tmp_path / "out"), "--checkpoint", str(quantised), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert all(case["tokens"]["tokens_equal"] for case in report["cases"])
    assert {case["selection"]["overlap"] for case in report["cases"] if case["selection"]} == {1.0}


def test_a_tensor_that_a_quantised_checkpoint_lacks_is_named(tmp_path):
    quantised, _ = write_quantised(tmp_path, WRITERS["awq-32"])
    tensors = load_file(quantised / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit its config: model\.language_model\.norm\.weight"):
        load(quantised)
