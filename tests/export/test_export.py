"""The export as a whole: what a bundle holds, and how it says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models

from checkpoints import (
    HUB,
    NEWER,
    TINY,
    Sizes,
    config,
    make_checkpoint,
    make_sparse_checkpoint,
    random_tensors,
    shapes,
    write_json,
)
from export.__main__ import main
from export.writer import ExportOptions, export
from hawk_trt.bundle import MANIFEST, Bundle, HeadWeights, manifest_bytes, read_manifest
from hawk_trt.errors import BundleError, CheckpointError, InvalidInput
from hawk_trt.models.registry import read_config
from hawk_trt.stages import STAGES, TARGETS

ROOT = Path(__file__).parents[2]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EMBEDDINGS = "language_model.embed_tokens.weight"
Q_PROJ = "language_model.layers.0.self_attn.q_proj.weight"


def weight_hashes(bundle):
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items() if entry.weights}


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


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)


def assert_one_line_error(finished, message, status=1):
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    # beside the error itself: how far a slow machine had come, and the command that helps
    lines = finished.stderr.strip().splitlines()
    assert len([line for line in lines if " of weights" not in line and not line.startswith("  try: ")]) == 1
    assert message in finished.stderr


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tensors)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, checkpoint):
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "out")


def test_a_bundle_holds_all_graphs_of_all_targets_and_what_it_was_made_from(bundle, checkpoint):
    manifest = bundle.manifest
    assert {(graph.stage, graph.target) for graph in manifest.graphs} == {(s, p) for s in STAGES for p in TARGETS}
    assert set(manifest.files) == {path.name for path in bundle.folder.iterdir()} - {MANIFEST}
    assert (bundle.folder / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert manifest.source.name == "model"
    assert manifest.source.architecture == "Qwen2_5_VLForConditionalGeneration"
    assert manifest.head_weights == HeadWeights((0.25,) * 4, "uniform (not calibrated)")
    assert manifest.special_tokens.vision_end == TINY.vocab_size - 4
    Bundle.load(bundle.folder, verify=True)


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


def test_another_architecture_is_refused(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    write_json(folder / "config.json", config() | {"architectures": ["LlamaForCausalLM"]})
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
    export(folder, tmp_path / "warm", ExportOptions(dtype=dtype))  # imports and caches are not the weights'
    tracemalloc.start()
    try:
        made = export(folder, tmp_path / "out", ExportOptions(dtype=dtype))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.manifest.files["embed_tokens.data"].size_bytes >= 64e6
    assert peak_bytes < 24e6


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


def test_exporting_again_does_nothing_until_something_changes(tmp_path, tensors):
    folder, out = make_checkpoint(tmp_path / "model", tensors), tmp_path / "out"
    export(folder, out)

    def written():
        before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
        yield
        yield before != {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}

    def changes(options=None):
        check = written()
        next(check)
        export(folder, out, options)
        return next(check)

    assert not changes()
    assert not changes(ExportOptions(targets=TARGETS[::-1]))
    assert changes(ExportOptions(force=True))
    assert changes(ExportOptions(targets=("cpu",)))
    assert changes(ExportOptions(normalization="minmax"))
    assert changes(ExportOptions(dtype="bfloat16"))
    assert changes(ExportOptions(im_end_token_id=7))
    assert changes(ExportOptions(head_weights=HeadWeights((1.0, 2.0, 3.0, 4.0), "mine")))
    assert changes(ExportOptions(link=True))
    assert changes()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert changes()
    write_json(folder / "tokenizer_config.json", {"extra": 1})
    assert changes()
    (out / "decoder.data").write_bytes(b"cut")
    assert changes()
    (out / "config.json").write_bytes((out / "config.json").read_bytes() + b" ")
    assert changes()
    assert not changes()


def test_the_two_flags_give_a_checkpoint_without_tokenizer_its_query_bounds(tmp_path, checkpoint):
    options = ExportOptions(im_end_token_id=7, vision_end_token_id=0)
    tokens = export(checkpoint, tmp_path / "out", options).manifest.special_tokens
    assert (tokens.im_end, tokens.vision_end) == (7, 0)
    with pytest.raises(InvalidInput, match=r"im_end_token_id: got 320, expected 0 to 319"):
        export(checkpoint, tmp_path / "other", ExportOptions(im_end_token_id=320))


def test_the_tokenizers_added_tokens_are_found(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(11)}))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert export(folder, tmp_path / "out").manifest.special_tokens.im_end == 11
    write_json(folder / "tokenizer.json", {"added_tokens": [{"content": "<|im_end|>"}]})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its added_tokens"):
        export(folder, tmp_path / "out")


def test_a_preprocessor_nested_by_newer_saves_is_written_on_its_own(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    write_json(folder / "processor_config.json", {"image_processor": {"min_pixels": 3136}})
    made = export(folder, tmp_path / "out")
    assert json.loads(made.read_text("preprocessor_config.json")) == {"min_pixels": 3136}


@pytest.mark.parametrize("head", ["v_head.summary.weight", "score.weight"])
def test_a_head_of_training_is_left_out_with_a_note(tmp_path, tensors, head):
    folder = make_checkpoint(tmp_path / "model", {**tensors, head: np.zeros((1, 4), np.float32)})
    notes = []
    export(folder, tmp_path / "out", note=notes.append)
    assert any(head in note and "left out" in note for note in notes)


def changed_tiny(tmp_path, **changes):
    """The tiny checkpoint with other texts or keys in some of its small files."""
    folder = tmp_path / "tiny"
    source = Path(__file__).parents[2] / "examples" / "tiny-vlm"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("samples", "README.md"))
    for stem, change in changes.items():
        path = next(folder.glob(f"{stem}.*"))
        if isinstance(change, str):
            path.write_text(change, encoding="utf-8")
        else:
            write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "{% for %}"}, "no prompt can be made.*chat template"),
        ({"chat_template": "{{ messages[0].nothing.at_all }}"}, "no prompt can be made"),
        ({"chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"}, "makes no image and no video of it"),
        ({"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "without an end"),
        ({"tokenizer": "{}"}, "tokenizer.json: the installed tokenizers package cannot read it"),
        ({"preprocessor_config": {"rescale_factor": "x"}}, "preprocessor_config.json: rescale_factor: got 'x'"),
        ({"preprocessor_config": {"size": [1]}}, r"preprocessor_config.json: size: got \[1\]"),
        ({"preprocessor_config": {"image_mean": "x"}}, "preprocessor_config.json: image_mean"),
        ({"preprocessor_config": {"image_std": [0, 0, 1e-30]}}, "preprocessor_config.json: image_std"),
        ({"preprocessor_config": {"resample": True}}, "preprocessor_config.json: resample: got True"),
        ({"preprocessor_config": {"max_pixels": 1.5}}, "preprocessor_config.json: max_pixels: got 1.5"),
    ],
)
def test_what_no_prompt_could_use_is_refused_by_the_export(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        export(changed_tiny(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_are_null_count_as_not_there(tmp_path):
    nothing = dict.fromkeys(("size", "rescale_factor", "resample", "image_mean", "image_std", "min_pixels"))
    made = export(changed_tiny(tmp_path, preprocessor_config=nothing | {"max_pixels": 50176.0}), tmp_path / "out")
    assert json.loads(made.read_text("preprocessor_config.json"))["size"] is None


def test_all_stop_tokens_end_an_answer_and_a_note_says_when_none_ends_a_chat(tmp_path):
    def exported(name, **changes):
        notes = []
        made = export(changed_tiny(tmp_path / name, **changes), tmp_path / name / "out", note=notes.append)
        return made.manifest.special_tokens.eos, [note for note in notes if "ends a chat" in note]

    eos, notes = exported("all", generation_config={"eos_token_id": [456, 1]})
    assert (eos, notes) == ((456, 1, 458), [])
    source = Path(__file__).parents[2] / "examples" / "tiny-vlm" / "chat_template.jinja"
    template = source.read_text(encoding="utf-8").replace("<|im_end|>", "<|vision_pad|>")
    eos, (note,) = exported("none", chat_template=template)
    assert eos == (458,)
    assert "ends an answer with <|vision_pad|>, the checkpoint's stop tokens are <|im_end|>" in note


def test_a_note_says_that_the_sampling_of_generation_config_cannot_be_used(tmp_path):
    notes = []
    export(changed_tiny(tmp_path, generation_config={"temperature": "hot"}), tmp_path / "out", note=notes.append)
    (note,) = [note for note in notes if "generation_config" in note]
    assert note.startswith("generation_config.json: damaged (Expected `float | null`, got `str` - at `$.temperature`)")
    assert note.endswith("Correct it in the checkpoint and export again, or serve with --generation-config none")


def test_a_changed_byte_is_refused(tmp_path, checkpoint):
    out = export(checkpoint, tmp_path / "out").folder

    def flip(name):
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)

    flip("decoder.data")
    Bundle.load(out)
    with pytest.raises(BundleError, match=r"decoder\.data: its content changed"):
        Bundle.load(out, verify=True)
    flip("decoder.data")
    flip("decoder.portable.onnx")
    with pytest.raises(BundleError, match=r"decoder\.portable\.onnx: its content changed"):
        Bundle.load(out)
    flip("decoder.portable.onnx")
    path = out / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"l2"', b'"l3"'))
    with pytest.raises(BundleError, match=r"bundle\.json: its content changed"):
        Bundle.load(out)


@pytest.mark.parametrize(("version", "advice"), [(99, "Update hawk_trt, or with this version: Export"), (2, "Export")])
def test_a_bundle_of_another_schema_is_refused_and_may_be_replaced(tmp_path, checkpoint, version, advice):
    out = export(checkpoint, tmp_path / "out").folder
    other = json.loads(manifest_bytes(read_manifest(out))) | {"schema_version": version}
    write_json(out / MANIFEST, other)
    with pytest.raises(BundleError, match=rf"version {version}, this hawk_trt reads 3\. {advice} again: make export"):
        Bundle.load(out)
    assert export(checkpoint, out).manifest.schema_version == 3


def test_a_bundle_holds_the_targets_that_run_its_dtype_or_those_asked_for(tmp_path, checkpoint):
    assert ExportOptions().targets == TARGETS
    assert ExportOptions(dtype="bfloat16").targets == ("cuda", "tensorrt", "portable")
    with pytest.raises(InvalidInput, match="targets of bfloat16: got cpu, expected of cuda, tensorrt, portable"):
        ExportOptions(dtype="bfloat16", targets=("cpu",))
    arguments = ["--target", "portable,cpu", "--target", "cuda"]
    assert main([str(checkpoint), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert read_manifest(tmp_path / "out").targets == ("cpu", "cuda", "portable")


def test_the_command_reports_on_stdout_and_says_when_nothing_was_to_do(tmp_path, checkpoint, capsys):
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--target", "cpu", "--dtype", "float16"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["up_to_date"], result["targets"], result["dtype"]) == (False, ["cpu"], "float16")
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().out


def test_wrong_usage_exits_2(tmp_path, checkpoint, capsys):
    out = ["--out", str(tmp_path / "out")]
    for arguments in (
        [str(checkpoint)],
        [str(checkpoint), *out, "--dtype", "int2"],
        [str(checkpoint), *out, "--target", "fast"],
        [str(checkpoint), *out, "--im-end-token-id", "x"],
        [str(checkpoint), *out, "--revision", "main"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "See: python -m export --help" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failure_is_one_line_on_stderr(tmp_path):
    assert_one_line_error(
        run("-m", "export", tmp_path / "nowhere", "--out", tmp_path / "out"), "nowhere: no such folder"
    )


def test_shapes_of_the_tests_are_those_of_the_exporter():
    from export.graphs import inventory

    model = read_config(config())
    assert inventory(model.language, model.vision) == shapes()
