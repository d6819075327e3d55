"""The weights of a bundle: every tensor of the checkpoint, rounded to the dtype or linked, and nothing else."""

import itertools
import os
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from checkpoints import (
    HUB,
    NEWER,
    Sizes,
    config,
    make_checkpoint,
    make_sparse_checkpoint,
    random_tensors,
    write_json,
)
from export.checkpoint import Checkpoint
from export.weights import WeightStore
from export.writer import ExportOptions, export
from hawk_trt import Pipeline
from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, CheckpointError
from random_models import prompt

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EMBEDDINGS = "language_model.embed_tokens.weight"
Q_PROJ = "language_model.layers.0.self_attn.q_proj.weight"


def weight_hashes(bundle):
    return {name: entry.xxh3 for name, entry in bundle.manifest.files.items() if entry.weights}


def stored_tensors(bundle):
    """All external initializers of all graphs, by name, as the graphs refer to them."""
    found = {}
    for entry in bundle.manifest.graphs:
        for name, value in ir.load(bundle.folder / entry.file).graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                found.setdefault(name, []).append(value.const_value)
    return found


def stored_bytes(bundle, tensor):
    """What lies where a graph says, read without onnx, which refuses hard links."""
    return (bundle.folder / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
def test_every_stored_weight_equals_the_checkpoints_rounded_to_the_dtype(tmp_path, source, target):
    tensors = random_tensors(dtype=source)
    folder = make_checkpoint(tmp_path / "model", tensors)
    made = export(folder, tmp_path / "out", ExportOptions(dtype=target))
    stored = stored_tensors(made)
    assert set(stored) | {EMBEDDINGS} == set(tensors)
    for name, array in tensors.items():
        expected = array.astype(NUMPY[target])
        assert len({(tensor.location, tensor.offset) for tensor in stored.get(name, [])}) <= 1
        for tensor in stored.get(name, []):
            assert stored_bytes(made, tensor) == expected.tobytes(), name
    np.testing.assert_array_equal(made.embedding_table(), tensors[EMBEDDINGS].astype(NUMPY[target]))


@pytest.fixture
def slow_size(tmp_path):
    """A checkpoint whose vision tower has an MLP of 60, which fills no 16 bytes in half precision; its tensors."""
    sizes = Sizes(vision_intermediate_size=60)
    tensors = random_tensors(sizes)
    return make_checkpoint(tmp_path / "model", tensors, sizes=sizes), tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_inner_size_that_gpus_are_slow_with_is_filled_up_with_zeros(slow_size, tmp_path, dtype):
    folder, tensors = slow_size
    bundle = export(folder, tmp_path / "out", ExportOptions(dtype))
    stored = stored_tensors(bundle)
    for layer, shape in {"gate_proj.weight": (64, 32), "up_proj.bias": (64,), "down_proj.weight": (32, 64)}.items():
        (tensor, *_), own = stored[f"visual.blocks.1.mlp.{layer}"], tensors[f"visual.blocks.1.mlp.{layer}"]
        held = np.frombuffer(stored_bytes(bundle, tensor), NUMPY[dtype]).reshape(shape)
        np.testing.assert_array_equal(held[tuple(slice(size) for size in own.shape)], own.astype(NUMPY[dtype]))
        assert not np.delete(held.astype(np.float32), np.s_[:60], own.shape.index(60)).any()


def test_zeros_that_fill_up_change_nothing_and_linked_weights_have_none(slow_size, tmp_path):
    copied, linked = (
        export(slow_size[0], tmp_path / name, ExportOptions(link=name == "linked")) for name in ("out", "linked")
    )
    assert stored_tensors(linked)["visual.blocks.0.mlp.up_proj.bias"][0].shape == (60,)
    inputs = prompt(1176, images=[(1, 8, 12)])
    embeds = []
    for bundle in (copied, linked):
        with Pipeline.load(bundle.folder, threads=1) as pipe:
            embeds.append(pipe.vision_cache.encode([(inputs, pipe.processor.layout(inputs))])[0].numpy())
    np.testing.assert_allclose(*embeds, rtol=0, atol=1e-6)


def test_weights_lie_on_boundaries_that_vector_loads_want(bundle):
    offsets = [tensor.offset for same in stored_tensors(bundle).values() for tensor in same]
    assert all(offset % 64 == 0 for offset in offsets)


def test_naming_generations_and_shards_make_no_difference(tmp_path, tensors, bundle):
    for number, (naming, shards) in enumerate(((HUB, 3), (NEWER, 1), (NEWER, 4))):
        folder = make_checkpoint(tmp_path / f"model{number}", tensors, naming=naming, shards=shards)
        other = export(folder, tmp_path / f"out{number}")
        assert weight_hashes(other) == weight_hashes(bundle)
        assert other.manifest.language == bundle.manifest.language
        for graph in bundle.manifest.graphs:
            assert other.manifest.files[graph.file] == bundle.manifest.files[graph.file]


def test_tied_embeddings_are_stored_once_and_serve_as_table(tmp_path):
    tensors = random_tensors(tied=True)
    made = export(make_checkpoint(tmp_path / "model", tensors, tied=True), tmp_path / "out")
    assert "embed_tokens.data" not in made.manifest.files
    assert "lm_head.weight" not in stored_tensors(made)
    np.testing.assert_array_equal(made.embedding_table(), tensors[EMBEDDINGS])
    assert sum(entry.size_bytes for entry in made.manifest.files.values() if entry.weights) < 1.01 * sum(
        array.nbytes for array in tensors.values()
    )


def test_a_tied_checkpoint_may_repeat_its_embeddings_but_not_contradict_them(tmp_path):
    tensors = random_tensors(tied=True)
    plain = export(make_checkpoint(tmp_path / "plain", tensors, tied=True), tmp_path / "a")
    repeated = tensors | {"lm_head.weight": tensors[EMBEDDINGS]}
    assert weight_hashes(export(make_checkpoint(tmp_path / "repeated", repeated, tied=True), tmp_path / "b")) == (
        weight_hashes(plain)
    )
    other = tensors | {"lm_head.weight": tensors[EMBEDDINGS] + 1}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        export(make_checkpoint(tmp_path / "other", other, tied=True), tmp_path / "c")


@pytest.mark.parametrize(
    "missing", [Q_PROJ, "language_model.layers.1.self_attn.k_proj.bias", "visual.merger.ln_q.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_an_error_that_names_it(tmp_path, tensors, missing):
    rest = {name: array for name, array in tensors.items() if name != missing}
    with pytest.raises(CheckpointError, match=f"no tensor {missing}"):
        export(make_checkpoint(tmp_path / "model", rest), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_no_graph_reads_is_an_error_that_names_it(tmp_path, tensors):
    extra = tensors | {"language_model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"1 tensors that no graph reads: language_model\.layers\.0.*q_norm"):
        export(make_checkpoint(tmp_path / "model", extra), tmp_path / "out")


def test_a_config_of_other_sizes_is_an_error_that_names_a_tensor(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    for key, value in (("vocab_size", 352), ("num_key_value_heads", 4), ("num_hidden_layers", 2)):
        write_json(folder / "config.json", config() | {key: value})
        with pytest.raises(CheckpointError, match="tensor"):
            export(folder, tmp_path / "out")
    made_up = config()["vision_config"] | {"hidden_size": 2**30}  # nothing of that size is made
    write_json(folder / "config.json", config() | {"vision_config": made_up})
    with pytest.raises(CheckpointError, match=r"tensor visual\.patch_embed\.proj\.weight: shape"):
        export(folder, tmp_path / "out")
    write_json(folder / "config.json", config() | {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="num_hidden_layers: got 1, expected at least 2"):
        export(folder, tmp_path / "out")


def test_another_architecture_is_refused(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    write_json(folder / "config.json", config() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"got LlamaForCausalLM.*Qwen2_5_VL"):
        export(folder, tmp_path / "out")


def test_a_value_too_large_for_float16_is_refused_with_tensor_and_magnitude(tmp_path, tensors):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float64):
        large = {name: array.astype(dtype) for name, array in tensors.items()}
        large[Q_PROJ][3, 5] = -131072.0
        large[Q_PROJ][3, 6] = np.inf
        folder = make_checkpoint(tmp_path / np.dtype(dtype).name, large)
        with pytest.raises(CheckpointError, match=rf"{Q_PROJ}: its largest magnitude, 131072, does not fit float16"):
            export(folder, tmp_path / "out", ExportOptions(dtype="float16"))
        assert list(tmp_path.glob("*out*")) == []
        export(folder, tmp_path / "fits" / np.dtype(dtype).name, ExportOptions(dtype="bfloat16"))


def test_infinities_of_the_checkpoint_stay(tmp_path, tensors):
    infinite = dict(tensors)
    infinite[Q_PROJ] = tensors[Q_PROJ].copy()
    infinite[Q_PROJ][0, 0] = np.inf
    made = export(make_checkpoint(tmp_path / "model", infinite), tmp_path / "out", ExportOptions(dtype="float16"))
    assert np.isinf(np.frombuffer(stored_bytes(made, stored_tensors(made)[Q_PROJ][0]), np.float16)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_stays_small_however_large_a_tensor_is(tmp_path, dtype):
    folder = make_sparse_checkpoint(tmp_path / "model", Sizes(vocab_size=500_000), shards=1)
    small = make_sparse_checkpoint(tmp_path / "small", Sizes(), shards=1)
    export(small, tmp_path / "warm", ExportOptions(dtype=dtype))  # imports and caches are not the weights'
    tracemalloc.start()
    try:
        made = export(folder, tmp_path / "out", ExportOptions(dtype=dtype))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.manifest.files["embed_tokens.data"].size_bytes >= 64e6
    assert peak_bytes < 24e6


def endless_file(checkpoint):
    """A store of one file that is never at its end."""
    store = WeightStore(Checkpoint.open(checkpoint), "float32")
    store._place("endless.data", "endless", 1 << 40, lambda: itertools.repeat(np.zeros(1 << 12, np.uint8)))
    return store


def test_a_file_that_cannot_be_made_stops_the_one_that_is_written_beside_it(tmp_path, checkpoint):
    def broken():
        raise CheckpointError("cannot be read")

    store = endless_file(checkpoint)
    store._place("broken.data", "broken", 1, broken)
    with store.writing(tmp_path) as finish, pytest.raises(CheckpointError, match="cannot be read"):
        finish()
    assert {path.name for path in tmp_path.iterdir()} == {"endless.data", "broken.data"}


def test_an_interrupt_stops_a_file_that_is_being_written(tmp_path, checkpoint):
    store = endless_file(checkpoint)
    with pytest.raises(KeyboardInterrupt), store.writing(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / "endless.data").stat().st_size > 0


@pytest.mark.parametrize("shards", [1, 3])
def test_linked_weights_are_the_checkpoints_own_files(tmp_path, shards):
    tensors = random_tensors(dtype="BF16")
    folder = make_checkpoint(tmp_path / "model", tensors, shards=shards)
    made = export(folder, tmp_path / "out", ExportOptions(dtype="bfloat16", link=True))
    files = sorted(folder.glob("*.safetensors"))
    assert sorted(weight_hashes(made)) == [path.name for path in files]
    for path in files:
        assert path.stat().st_nlink == 2
        assert path.samefile(made.folder / path.name)
    stored = stored_tensors(made)
    for name, array in tensors.items():
        for tensor in stored.get(name, []):
            assert stored_bytes(made, tensor) == array.tobytes()
    np.testing.assert_array_equal(made.embedding_table(), tensors[EMBEDDINGS])
    Bundle.load(made.folder, verify=True)


def test_linking_refuses_what_it_would_have_to_convert(tmp_path, tensors):
    mixed = tensors | {Q_PROJ: tensors[Q_PROJ].astype(np.float16)}
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}: float16.*converted to float32\. Drop --link"):
        export(make_checkpoint(tmp_path / "model", mixed), tmp_path / "out", ExportOptions(link=True))


def test_linking_to_another_file_system_says_to_drop_link(checkpoint):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == checkpoint.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    out = memory / f"hawk-trt-test-{os.getpid()}" / "out"
    try:
        with pytest.raises(BundleError, match=r"cannot be hard-linked.*Drop --link"):
            export(checkpoint, out, ExportOptions(link=True))
        assert list(out.parent.iterdir()) == []
    finally:
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("link", [False, True])
def test_onnx_runtime_opens_every_graph_of_the_bundle(tmp_path, checkpoint, link):
    import onnxruntime

    made = export(checkpoint, tmp_path / "out", ExportOptions(link=link))
    for graph in made.manifest.graphs:
        session = onnxruntime.InferenceSession(made.folder / graph.file, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [entry.name for entry in graph.inputs]
        assert [value.name for value in session.get_outputs()] == [entry.name for entry in graph.outputs]
