"""Reading checkpoints: both naming generations, shards, and everything that can be wrong with the files."""

import json
import os
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoints import (
    HUB,
    NEWER,
    TINY,
    config,
    make_checkpoint,
    make_sparse_checkpoint,
    named,
    random_tensors,
    write_json,
    write_raw_safetensors,
    write_safetensors,
)
from export.architectures import read_config
from export.checkpoint import Checkpoint
from export.graphs import inventory
from export.tensor_file import read_tensor_file
from hawk_trt.apps.cli.models import download, is_hub_id
from hawk_trt.errors import CheckpointError

NORM = "language_model.norm.weight"


def read(checkpoint, name):
    tensor = checkpoint.tensor(name)
    return np.concatenate([block.copy() for block in tensor.blocks()]).reshape(tensor.shape)


def write_header(path, header, data=b""):
    write_raw_safetensors(path, header, data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("naming", [HUB, NEWER], ids=["hub", "newer"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_has_one_canonical_name_and_its_own_values(tmp_path, naming, shards):
    tensors = random_tensors()
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", tensors, naming=naming, shards=shards))
    assert checkpoint.unused() == sorted(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read(checkpoint, name), array)
    assert checkpoint.unused() == []


def test_the_safetensors_package_reads_what_the_tests_write(tmp_path):
    tensors = random_tensors()
    loaded = load_file(make_checkpoint(tmp_path / "model", tensors) / "model.safetensors")
    assert {named(name, HUB) for name in tensors} == set(loaded)
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[named(name, HUB)], array)


def test_a_sparse_7b_checkpoint_is_read_without_taking_disk_or_memory(tmp_path):
    folder = make_sparse_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    model = read_config(checkpoint.config)
    expected = inventory(model.language, model.vision)
    assert checkpoint.unused() == sorted(expected)
    for name, shape in expected.items():
        checkpoint.tensor(name, shape)
    assert not checkpoint.unused()
    assert sum(file.path.stat().st_size for file in checkpoint.files) > 16e9
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 4e6


def test_shards_without_an_index_are_read_when_all_are_there(tmp_path):
    folder = make_checkpoint(tmp_path / "model", shards=3)
    (folder / "model.safetensors.index.json").unlink()
    assert len(Checkpoint.open(folder).files) == 3
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing, one of 3 shards"):
        Checkpoint.open(folder)


def test_a_missing_tensor_is_named_with_those_of_near_names(tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    with pytest.raises(
        CheckpointError, match=r"no tensor language_model\.nrom\.weight.*nearest.*language_model\.norm\.weight"
    ):
        checkpoint.tensor("language_model.nrom.weight")


def test_a_shape_that_config_does_not_ask_for_is_named(tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"norm\.weight: shape \[64\], config\.json asks for \[128\]"):
        checkpoint.tensor(NORM, (128,))


@pytest.mark.parametrize(
    ("buffer", "values"),
    [
        ("language_model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32)),
        ("language_model.rotary_emb.original_inv_freq", np.ones(8, np.float32)),
        ("visual.embeddings.position_ids", np.arange(8)),
    ],
)
def test_saved_buffers_need_no_reader(tmp_path, buffer, values):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", random_tensors() | {buffer: values}))
    assert buffer not in checkpoint.unused()


def test_a_head_that_is_missing_says_how_to_tie_it(tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", random_tensors(tied=True)))
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight.*tie_word_embeddings: true"):
        checkpoint.tensor("lm_head.weight", (1, 1))


def test_a_folder_that_is_no_checkpoint_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        Checkpoint.open(tmp_path)
    write_json(tmp_path / "config.json", config())
    with pytest.raises(CheckpointError, match=r"no weights there, expected model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_damaged_config_is_refused(tmp_path, content):
    folder = make_checkpoint(tmp_path / "model")
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        Checkpoint.open(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    write_json(tmp_path / "config.json", config())
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    write_json(tmp_path / "config.json", config())
    write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    path = make_checkpoint(tmp_path / "model") / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(truncated|not safetensors)"):
            Checkpoint.open(path.parent)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*damaged"):
        Checkpoint.open(path.parent)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([1], "no JSON object"),
        ({"w": 3}, "tensor w: got 3"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "tensor w: got"),
        ({"w": entry(shape=(-2,))}, "tensor w: got"),
        ({"w": entry(shape=(2.0,))}, "tensor w: got"),
        ({"w": entry(shape=(True, 2))}, "tensor w: got"),
        ({"w": entry(dtype="Q4_K")}, "tensor w: dtype Q4_K"),
        ({"w": entry(shape=(3,))}, r"tensor w: 8 bytes at 0 to 8, expected 12 for F32 \[3\]"),
        ({"w": entry(offsets=(8, 0))}, "tensor w: -8 bytes"),
        ({"w": entry(offsets=(8, 16))}, "tensor w: starts at byte .* leaves a gap"),
        ({"v": entry(), "w": entry(offsets=(4, 12))}, "tensor w: .* overlaps"),
        ({"v": entry(), "w": entry(offsets=(8, 16))}, "tensor w: ends at byte .*truncated"),
        (b'{"w": {}, "w": {}}', "names 'w' twice"),
    ],
)
def test_a_wrong_header_is_refused_with_file_and_tensor(tmp_path, header, message):
    path = write_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_tensor_file(path)


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=64) | st.binary(max_size=48).map(lambda tail: len(tail).to_bytes(8, "little") + tail))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        assert read_tensor_file(path).tensors == ()
    except CheckpointError as error:
        assert "any.safetensors" in str(error)


def test_an_index_must_name_files_that_are_there(tmp_path):
    folder = make_checkpoint(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for changed, message in (
        ({"model.norm.weight": "model-00003-of-00003.safetensors"}, r"model-00003-of-00003\.safetensors: missing"),
        ({"model.norm.weight": "../secret.safetensors"}, "expected a name without folders"),
        ({"model.norm.weight": ["a"]}, "expected a name without folders"),
    ):
        write_json(index, {"weight_map": weight_map | changed})
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)
    for stale in (
        {"model.norm.weight": "model-00001-of-00002.safetensors"},
        {"model.none": "model-00002-of-00002.safetensors"},
    ):
        write_json(index, {"weight_map": weight_map | stale})  # which transformers reads: every file counts as a whole
        assert NORM in Checkpoint.open(folder).tensors
    for empty in ({}, {"weight_map": {}}, {"weight_map": 3}):
        write_json(index, empty)
        with pytest.raises(CheckpointError, match="no weight_map"):
            Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = make_checkpoint(tmp_path / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing.*index\.json"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "model", shards=2)
    first, second = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    write_safetensors(second, load_file(second) | dict([load_file(first).popitem()]))
    with pytest.raises(CheckpointError, match=r"model-00002.*: tensor .*: given twice, model-00001"):
        Checkpoint.open(folder)


def test_one_tensor_under_both_generations_names_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    norm = np.ones(TINY.hidden_size, np.float32)
    write_safetensors(
        folder / "model.safetensors", {"model.norm.weight": norm, "model.language_model.norm.weight": norm}
    )
    with pytest.raises(CheckpointError, match=r"given twice.*holds language_model\.norm\.weight too"):
        Checkpoint.open(folder)


def test_quantised_checkpoints_are_refused_by_name(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    for name, array in (
        ("model.layers.0.self_attn.q_proj.qweight", np.zeros((4, 4), np.int32)),
        ("model.layers.0.self_attn.q_proj.weight", np.zeros((4, 4), np.int8)),
        ("model.layers.0.self_attn.q_proj.weight", np.zeros((4, 4), ml_dtypes.float8_e4m3fn)),
        ("model.layers.0.self_attn.q_proj.scales", np.zeros(4, np.float16)),
    ):
        write_safetensors(folder / "model.safetensors", {name: array})
        with pytest.raises(CheckpointError, match=rf"{name}.*quantised"):
            Checkpoint.open(folder)
    write_json(folder / "config.json", config() | {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(CheckpointError, match=r"q_proj: no tensor qweight beside scales"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("left", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"bits": 4}])
def test_a_quantization_config_beside_plain_weights_says_what_to_delete(tmp_path, left):
    folder = make_checkpoint(tmp_path / "model")
    write_json(folder / "config.json", config() | {"quantization_config": left})
    with pytest.raises(CheckpointError, match=r"left over.*plain floats. Delete the key from config.json"):
        Checkpoint.open(folder)
    for nothing in (None, {}):
        write_json(folder / "config.json", config() | {"quantization_config": nothing})
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.embed_tokens.lora_embedding_B.default",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_weights_saved_from_inside_peft_say_how_to_merge(tmp_path, name):
    folder = make_checkpoint(tmp_path / "model")
    write_safetensors(folder / "model.safetensors", {name: np.zeros(4, np.float16)})
    with pytest.raises(CheckpointError, match=r"saved from inside PEFT.*merge_and_unload"):
        Checkpoint.open(folder)


def test_the_fingerprint_follows_configs_headers_sizes_and_times(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    seen = {Checkpoint.open(folder).fingerprint(("tokenizer.json",))}
    assert Checkpoint.open(folder).fingerprint(("tokenizer.json",)) in seen

    def changed():
        fingerprint = Checkpoint.open(folder).fingerprint(("tokenizer.json",))
        known = fingerprint in seen
        seen.add(fingerprint)
        return not known

    write_json(folder / "config.json", config() | {"extra": 1})
    assert changed()
    write_json(folder / "generation_config.json", {"eos_token_id": 1})
    assert changed()
    write_json(folder / "tokenizer.json", {})
    assert changed()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert changed()
    assert not changed()


def test_an_existing_folder_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_hub_id("owner/name")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")
    assert not is_hub_id("./owner/other")
    assert not is_hub_id("/absolute/other")
    assert not is_hub_id("one/two/three")


def test_a_missing_huggingface_hub_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"owner/name.*pip install huggingface_hub"):
        download("owner/name")


@pytest.mark.parametrize("architectures", [5, True, "Qwen2_5_VLForConditionalGeneration", {"a": 1}])
def test_architectures_that_are_no_list_are_refused_by_name(tmp_path, architectures):
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(config() | {"architectures": architectures}))
    with pytest.raises(CheckpointError, match="architectures"):
        read_config(Checkpoint.open(folder).config)
