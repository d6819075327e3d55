"""The engine folder: written whole or not at all, and refused where it is damaged, stale or foreign.

Plans are stand-ins with TensorRT's header, since real ones need a GPU; everything around them is the real thing.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from engines.__main__ import main
from engines.build_plan import BuildSettings, BuiltPlan, differences, plan_build
from engines.checks.verify import OutputRow, Verification, load_reference
from engines.profiles import LargestRequest
from engines.workarounds import WORKAROUNDS
from engines.writer import EMBEDDINGS_FILE, memory_warning, write_engines
from export.__main__ import main as export
from hawk_trt.bundle import Bundle, manifest_bytes
from hawk_trt.engine_folder import (
    ENGINES_MANIFEST,
    ENGINES_SCHEMA_VERSION,
    EngineFolder,
    Machine,
    plan_version,
)
from hawk_trt.errors import BackendError, BundleError, InvalidInput
from hawk_trt.runtime.versions import same_version
from hawk_trt.stages import FIRST_LAYER, STAGES, TENSORRT

ORIN = Machine("10.16.1.11", "13.0", "580.1", "Orin", "8.7")
REBUILD = "python -m engines bundle --out engines"


def header(version=(10, 16, 1, 11), magic=b"ftrt"):
    return magic + bytes(20) + bytes(version)


def planned(bundle, *, machine=ORIN, plugin=None, **limits):
    return plan_build(
        bundle,
        machine,
        TENSORRT,
        LargestRequest(**limits).limits(bundle.manifest, plugin=plugin is not None),
        BuildSettings(plugin, None, None, WORKAROUNDS[1:]),
        REBUILD,
    )


def stand_in(graph, entry):
    assert [tensor.name for tensor in entry.inputs] == [tensor.name for tensor in graph.inputs]
    content = header() + graph.stage.encode() * 100
    return BuiltPlan(memoryview(content), 7, int(graph.has_topk), ("TIMING",), 0, 0.5)


def written(bundle, out, **options):
    return write_engines(planned(bundle, **options), out, stand_in, None, pytest.fail)[0]


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.load(tiny_bundle)


@pytest.fixture
def folder(bundle, tmp_path):
    return written(bundle, tmp_path / "engines").folder


def test_a_folder_holds_all_that_the_runtime_needs_and_loads(bundle, folder):
    engines = EngineFolder.load(folder, verify=True)
    manifest = engines.manifest
    assert [engines.plan(stage).file for stage in STAGES] == [f"{stage}.plan" for stage in STAGES]
    assert engines.plan(FIRST_LAYER).onnx_xxh3 == bundle.manifest.files["first_layer.tensorrt.onnx"].xxh3
    assert manifest.machine == ORIN and manifest.target == TENSORRT and manifest.rebuild == REBUILD
    assert engines.plan(FIRST_LAYER).workarounds == ("no_horizontal_fusion",)
    assert engines.bundle.read_text("tokenizer.json") == bundle.read_text("tokenizer.json")
    np.testing.assert_array_equal(engines.bundle.embedding_table(), bundle.embedding_table())
    assert not [path.name for path in folder.iterdir() if path.suffix == ".onnx"]
    engines.bundle.check(verify=True)


def test_a_tied_embedding_table_is_cut_out_of_the_decoders_weights(bundle, folder):
    assert bundle.manifest.embeddings.file != EMBEDDINGS_FILE  # the tiny model is tied
    table = bundle.manifest.embeddings
    assert (folder / EMBEDDINGS_FILE).stat().st_size == table.shape[0] * table.shape[1] * 4


def test_a_table_with_a_file_of_its_own_is_linked(bundle, tmp_path):
    own = tmp_path / "bundle"
    shutil.copytree(bundle.folder, own)
    content = np.ascontiguousarray(bundle.embedding_table()).tobytes()
    (own / "table.data").write_bytes(content)
    entry = replace(bundle.manifest.files["decoder.data"], size_bytes=len(content), xxh3="0" * 32)
    manifest = replace(
        bundle.manifest,
        embeddings=replace(bundle.manifest.embeddings, file="table.data", offset=0),
        files=bundle.manifest.files | {"table.data": entry},
    )
    out = written(Bundle(own, manifest), tmp_path / "engines").folder
    assert (out / EMBEDDINGS_FILE).samefile(own / "table.data")


def test_a_plugin_that_a_plan_uses_comes_along(bundle, tmp_path):
    library = tmp_path / "libtopk.so"
    library.write_bytes(b"\x7fELF")
    engines = written(bundle, tmp_path / "engines", plugin=library)
    assert engines.plugin.read_bytes() == b"\x7fELF"
    assert engines.manifest.plugin_xxh3 == engines.manifest.files["libtopk.so"].xxh3
    assert engines.plan(FIRST_LAYER).plugin_layers == 1
    assert written(bundle, tmp_path / "without").plugin is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder.plan", None, "decoder.plan: missing"),
        ("decoder.plan", b"short", "decoder.plan: got 5 bytes, expected 728"),
        ("decoder.plan", header(magic=b"vtrt") + b"decoder" * 100, "a plan of TensorRT-RTX, expected one of TensorRT"),
        ("decoder.plan", bytes(728), r"not a TensorRT plan \(begins with"),
        ("decoder.plan", header((10, 3, 0, 26)) + b"decoder" * 100, "written by TensorRT 10.3.0.26, engines.json says"),
        ("config.json", b"{}", "config.json: got 2 bytes"),
        (EMBEDDINGS_FILE, b"", "embed_tokens.data: got 0 bytes"),
    ],
)  # fmt: skip
def test_a_missing_damaged_or_foreign_file_is_refused_with_the_command_that_rebuilds(folder, name, change, message):
    path = folder / name
    path.unlink()
    if change is not None:
        path.write_bytes(change)
    with pytest.raises(BundleError, match=message) as error:
        EngineFolder.load(folder)
    assert str(error.value).endswith(f"Rebuild: {REBUILD}")


def test_a_changed_plan_of_the_same_size_is_found_by_its_hash(folder):
    path = folder / "vision.plan"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    EngineFolder.load(folder)
    with pytest.raises(BundleError, match=r"vision\.plan: its content changed since the build"):
        EngineFolder.load(folder, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": ENGINES_SCHEMA_VERSION + 1}, "schema version 6, this hawk_trt reads 5. Update"),
        ({"target": "portable"}, r"its content changed since the build \(its hash differs\)"),
        ({"limits": None}, r"damaged \(Expected `object`, got `null`"),
    ],
)  # fmt: skip
def test_a_newer_changed_or_damaged_manifest_is_refused(folder, change, message):
    path = folder / ENGINES_MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        EngineFolder.load(folder)


def test_a_plan_that_is_none_of_the_folders_files_is_refused(folder):
    manifest = EngineFolder.load(folder).manifest
    named = replace(manifest, plans=(replace(manifest.plans[0], file="x" * 5000), *manifest.plans[1:]))
    (folder / ENGINES_MANIFEST).write_bytes(manifest_bytes(named))
    with pytest.raises(BundleError, match=r"got the plan 'x{80}', expected one of its files"):
        EngineFolder.load(folder)


def test_a_folder_without_engines_says_how_to_build_them(tmp_path):
    with pytest.raises(BundleError, match=rf"no engines there .*hawk-trt build BUNDLE --out {tmp_path}"):
        EngineFolder.load(tmp_path)


@pytest.mark.parametrize(
    ("machine", "there"),
    [
        (replace(ORIN, gpu="NVIDIA H100", compute_capability="9.0"), r"this is sm_90 \(NVIDIA H100\)"),
        (replace(ORIN, gpu="Orin NX"), r"this is sm_87 \(Orin NX\)"),
        (replace(ORIN, tensorrt="10.3.0"), r"with TensorRT 10.3.0\. Rebuild"),
    ],
)
def test_plans_for_another_gpu_or_tensorrt_are_refused(folder, machine, there):
    engines = EngineFolder.load(folder)
    engines.check_machine(ORIN)
    engines.check_machine(replace(ORIN, driver="999", tensorrt="10.16.1"))
    with pytest.raises(BundleError, match=rf"built for sm_87 \(Orin\) with TensorRT 10.16.1.11, .*{there}"):
        engines.check_machine(machine)


def test_versions_are_compared_as_far_as_both_are_told():
    assert same_version("10.3.0", "10.3.0.26") and not same_version("10.3.0", "10.3.1")
    assert not same_version("10.3", "11.3")


def test_what_would_be_built_again_and_why(bundle, tmp_path):
    out = tmp_path / "engines"
    assert differences(planned(bundle), out) is None
    written(bundle, out)
    assert differences(planned(bundle), out) == []
    assert differences(planned(bundle, machine=replace(ORIN, driver="999")), out) == ["driver"]
    assert differences(planned(bundle, max_context=512), out) == ["limits"]
    library = tmp_path / "libtopk.so"
    library.write_bytes(b"one")
    assert differences(planned(bundle, plugin=library), out) == ["plugin"]
    (out / "vision.plan").unlink()
    assert differences(planned(bundle), out) is None


def test_a_folder_with_anything_else_in_it_is_not_replaced(bundle, tmp_path):
    out = tmp_path / "engines"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(BundleError, match=r"holds thesis\.txt, which no engine build wrote"):
        written(bundle, out)
    (out / "thesis.txt").unlink()
    folder = written(bundle, out).folder
    (folder / "decoder.plan").unlink()  # a damaged one of ours is
    assert EngineFolder.load(written(bundle, out).folder)
    (folder / ENGINES_MANIFEST).write_text("{")
    assert EngineFolder.load(written(bundle, out).folder)


def test_a_build_that_fails_leaves_what_was_there(bundle, tmp_path):
    out = written(bundle, tmp_path / "engines").folder
    before = (out / ENGINES_MANIFEST).read_bytes()

    def fails(graph, entry):
        if graph.stage == FIRST_LAYER:
            raise BackendError("no")
        return stand_in(graph, entry)

    with pytest.raises(BackendError, match="no"):
        write_engines(planned(bundle, max_context=64), out, fails, None, pytest.fail)
    assert (out / ENGINES_MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_wrong_plans_never_take_the_place_and_are_kept_aside(bundle, tmp_path):
    out, checked = tmp_path / "engines", []

    def check(folder):
        checked.append(EngineFolder.load(folder))
        row = OutputRow("decoder", "logits", 1, "", ("image: cosine 0.1, expected at least 0.99",))
        return Verification("bundle", "", (row,), False)

    with pytest.raises(BackendError, match=r"the plans are wrong: decoder: image: cosine 0\.1.*engines\.failed"):
        write_engines(planned(bundle), out, stand_in, check, pytest.fail)
    assert checked and not out.exists()
    assert EngineFolder.load(tmp_path / "engines.failed")


def test_plans_that_could_not_be_checked_are_kept_aside_too(bundle, tmp_path):
    def check(folder):
        raise BackendError(f"{EngineFolder.load(folder).manifest.machine.gpu}: gone.")

    with pytest.raises(BackendError, match=r"could not be checked: Orin: gone\. They are in .*engines\.failed"):
        write_engines(planned(bundle), tmp_path / "engines", stand_in, check, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["engines.failed"]


def test_a_reference_of_another_dtype_or_score_is_refused_before_the_build(bundle, tiny_checkpoint, tmp_path, capsys):
    other = tmp_path / "softmax"
    assert export([str(tiny_checkpoint), "--out", str(other), "--normalization", "softmax"]) == 0
    assert load_reference(bundle).made_by.endswith("float32, onnxruntime on cpu")
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "reference.npz"}
    bfloat16 = replace(bundle, manifest=replace(bundle.manifest, dtype="bfloat16", files=files))
    assert load_reference(bfloat16) is None
    assert load_reference(bfloat16, bundle.folder).made_by.endswith("float32, onnxruntime on cpu")
    assert main([str(bundle.folder), "--out", str(tmp_path / "engines"), "--reference", str(other)]) == 1
    assert "with softmax scores, expected a float32 export of the same checkpoint" in capsys.readouterr().err


def test_too_little_memory_is_said_before_the_first_build(bundle, tmp_path, monkeypatch):
    graphs = planned(bundle).graphs
    largest = max(graph.weight_bytes for graph in graphs)
    assert memory_warning(graphs, 4 * largest) is None
    assert memory_warning(graphs, None) is None
    warning = memory_warning(graphs, largest)
    assert warning.startswith("decoder: ") and "add swap" in warning
    monkeypatch.setattr("engines.writer.available_memory_bytes", lambda: largest)
    said = []
    write_engines(planned(bundle), tmp_path / "engines", stand_in, None, said.append)
    assert said == [warning]


def test_more_scratch_than_the_gpu_has_is_refused_with_the_flag_that_helps(bundle, tmp_path):
    def large(graph, entry):
        return replace(stand_in(graph, entry), scratch_bytes=9 << 30 if graph.stage == FIRST_LAYER else 0)

    with pytest.raises(
        BackendError, match=r"first_layer.plan: needs .* 9.7 GB of scratch.* 8.6 GB.*--max-prompt-tokens"
    ):
        write_engines(planned(bundle), tmp_path / "engines", large, None, pytest.fail, 8 << 30)
    assert not list(tmp_path.iterdir())
    assert write_engines(planned(bundle), tmp_path / "engines", large, None, pytest.fail, 16 << 30)


def test_a_manifest_is_the_same_after_writing_and_reading(folder):
    manifest = EngineFolder.load(folder).manifest
    assert manifest_bytes(manifest) == (folder / ENGINES_MANIFEST).read_bytes()
    assert plan_version(folder / "vision.plan", "") == "10.16.1.11"


@pytest.mark.parametrize("options", [(), ("--max-prompt-tokens", "3000")])  # 3000: enough on a Jetson, not beyond it
def test_the_command_without_tensorrt_says_how_to_get_it(bundle, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    monkeypatch.delitem(__import__("sys").modules, "engines.builder", raising=False)
    assert main([str(bundle.folder), "--out", str(tmp_path / "engines"), *options]) == 1
    printed = capsys.readouterr()
    assert "tensorrt: not installed" in printed.err and "pip install" in printed.err and "preflight" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-context", "99999"], "--max-context: got 99999, expected at most 4096"),
        (["--plugin", "missing.so"], "--plugin: missing.so is not there"),
        (["--workspace-gib", "0"], "--workspace-gib: got 0, expected more than 0"),
        (["--reference", "missing"], "missing: no bundle there"),
    ],
)
def test_the_command_refuses_wrong_options_before_anything_else(bundle, tmp_path, capsys, options, message):
    assert main([str(bundle.folder), "--out", str(tmp_path / "engines"), *options]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_needs_a_place_for_its_output(bundle, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(bundle.folder)])
    assert "--out" in capsys.readouterr().err


def test_rows_that_tensorrt_could_not_bind_are_refused_before_the_build(bundle):
    manifest = bundle.manifest
    narrow = replace(bundle, manifest=replace(manifest, language=replace(manifest.language, hidden_size=96)))
    with pytest.raises(InvalidInput, match="hidden_size: got 96 in float32, expected rows of a multiple of 256 bytes"):
        planned(narrow)
    flat = replace(bundle, manifest=replace(manifest, language=replace(manifest.language, head_dim=8)))
    with pytest.raises(InvalidInput, match="--max-context: got 322, expected a multiple of 4 with this model"):
        planned(flat, max_visual_tokens=256, max_prompt_tokens=320, max_context=322)
