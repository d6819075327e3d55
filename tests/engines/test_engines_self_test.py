"""The self-test's report, where it cannot get far: it says what failed, step by step, and never stops early."""

import os

import pytest

from engines.checks.self_test import main


@pytest.fixture
def no_tensorrt(tmp_path, monkeypatch):
    """Commands of the self-test find no tensorrt, wherever this runs."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "tensorrt.py").write_text("raise ModuleNotFoundError('hidden', name='tensorrt')")
    paths = [str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.usefixtures("no_tensorrt")
def test_every_engine_is_a_line_of_the_report_and_failures_say_why(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(repository)
    assert main(["--out", str(tmp_path / "out")]) == 1
    report = capsys.readouterr().out
    lines = [line for line in report.splitlines() if line.startswith("| ") and "without plugin" in line]
    assert [line.split(" | ")[0] for line in lines] == [
        "| float32, tensorrt, without plugin",
        "| float32, portable, without plugin",
        "| float16, tensorrt, without plugin",
        "| float16, portable, without plugin",
        "| bfloat16, tensorrt, without plugin",
        "| bfloat16, portable, without plugin",
    ]
    assert all("failed: tensorrt: not installed." in line and line.endswith("| FAILED |") for line in lines)
    assert report.startswith("### hawk_trt self-test") and report.rstrip().endswith("**FAILED**")


def test_a_checkpoint_that_cannot_be_exported_ends_it_with_the_reason(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(repository)
    assert main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    report = capsys.readouterr().out
    assert "| float32 | export failed: " in report and str(tmp_path / "none") in report
