"""The export as a whole: what a bundle holds, when it is written again, and how the command speaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import (
    TINY,
    config,
    make_checkpoint,
    shapes,
    write_json,
)
from export.__main__ import main
from export.architectures import read_config
from export.writer import ExportOptions, export
from hawk_trt.bundle import MANIFEST, SCHEMA_VERSION, Bundle, HeadWeights, manifest_bytes, read_manifest
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.stages import STAGES, TARGETS

ROOT = Path(__file__).parents[2]


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)


def assert_one_line_error(finished, message, status=1):
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    # beside the error itself: how far a slow machine had come, and the command that helps
    lines = finished.stderr.strip().splitlines()
    assert len([line for line in lines if " of weights" not in line and not line.startswith("  try: ")]) == 1
    assert message in finished.stderr


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


@pytest.mark.parametrize(("version", "advice"), [(99, "Update hawk_trt, or with this version: Export"), (3, "Export")])
def test_a_bundle_of_another_schema_is_refused_and_may_be_replaced(tmp_path, checkpoint, version, advice):
    out = export(checkpoint, tmp_path / "out").folder
    other = json.loads(manifest_bytes(read_manifest(out))) | {"schema_version": version}
    write_json(out / MANIFEST, other)
    with pytest.raises(
        BundleError,
        match=rf"version {version}, this hawk_trt reads {SCHEMA_VERSION}\. {advice} again: hawk-trt export ",
    ):
        Bundle.load(out)
    assert export(checkpoint, out).manifest.schema_version == SCHEMA_VERSION


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
