"""make gpu-report without a GPU: phases are rehearsed, a cut leaves what was found, wheels survive the carrying."""

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu_report import runner, wheels
from benchmarks.gpu_report.__main__ import main
from benchmarks.gpu_report.phases import PHASES
from benchmarks.gpu_report.provider import agreement
from benchmarks.gpu_report.record import Setting
from benchmarks.gpu_report.table import markdown

# shape_float16 is the function of shape_bfloat16, and on a CPU both run float32.
REHEARSED = [name for name in PHASES if name != "shape_float16"]


def run(name, setting, seconds, environment):
    """One phase in a process of its own, as all have them, and the others here: each would import PyTorch anew."""
    if name == "machine":
        return runner.phase_in_a_process(name, setting, seconds, environment)
    outcome = runner.run_phase(name, setting)
    results = json.loads((setting.work / f"{name}.json").read_text())
    assert results.pop("outcome") == outcome
    return {**outcome, "seconds": 0.0, "results": results}


def test_the_rehearsal_passes_every_phase_and_its_json_becomes_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    out = tmp_path / "report.json"
    assert runner.run_all(REHEARSED, Setting(tmp_path, 600, "cpu"), out, run) == 0
    printed = capsys.readouterr().out
    printed = printed[printed.index("**A rehearsal") :]
    report = json.loads(out.read_text())
    assert list(report["phases"]) == REHEARSED
    assert {name for name in REHEARSED if report["phases"][name]["status"] == "skipped"} == {"sanitizer"}
    assert report["phases"]["kernel"]["results"]["failures"] == []
    assert all(row["answers"] == row["answers_equal"] for row in report["phases"]["tiny"]["results"]["dtypes"])
    assert {row["target"] for row in report["phases"]["driver"]["results"]["backend"]} == {"portable", "tensorrt"}

    assert main(["--table", str(out)]) == 0
    table = capsys.readouterr().out
    assert table == printed
    assert table.startswith("**A rehearsal (cpu) without a GPU: its times mean nothing.**")
    stages = [line for line in table.splitlines() if line.startswith("| 13 of 64 |")]
    assert len(stages) == 2 and all(line.count("|") == 10 for line in stages)
    assert "FAILED" not in table


@pytest.fixture
def phases_of(tmp_path, monkeypatch):
    """Phases whose processes run the given code; the report of a run of them."""

    def run(seconds=30.0, **programs):
        monkeypatch.setattr(runner, "PHASES", dict.fromkeys(programs, ("machine", 30)))
        started = subprocess.Popen

        def popen(command, **options):
            code = programs[command[command.index("--phase") + 1]]
            return started([sys.executable, "-c", code.format(work=tmp_path)], **options)

        monkeypatch.setattr(runner.subprocess, "Popen", popen)
        runner.run_all([*programs], Setting(tmp_path, seconds, "cpu"), tmp_path / "report.json")
        return json.loads((tmp_path / "report.json").read_text())["phases"]

    return run


def test_a_phase_that_crashes_says_why_and_the_next_runs(phases_of):
    found = phases_of(
        first="raise SystemExit('this GPU is on fire')",
        second="import os; os.kill(os.getpid(), 11)",
        third='open(r\'{work}/third.json\', \'w\').write(\'{{"outcome": {{"status": "passed", "reason": null}}}}\')',
    )
    assert found["first"]["status"] == "failed" and "this GPU is on fire" in found["first"]["reason"]
    assert found["second"]["status"] == "failed" and "SIGSEGV" in found["second"]["reason"]
    assert found["third"]["status"] == "passed"


def test_a_phase_that_hangs_is_cut_and_keeps_what_it_wrote_down(phases_of):
    hangs = "import time; open(r'{work}/first.json', 'w').write('{{\"rows\": [1]}}'); time.sleep(600)"
    found = phases_of(seconds=3.0, first=hangs, second="")
    assert found["first"]["reason"].startswith("cut after")
    assert found["first"]["results"] == {"rows": [1]}
    assert found["second"] == {"status": "skipped", "reason": "no time was left", "seconds": 0.0, "results": {}}


def test_answers_that_differ_are_counted_before_they_fail():
    def answer(token, score):
        return SimpleNamespace(
            token_ids=[token],
            kept_indices=np.array([token]),
            scores=np.array([score]),
            logits=np.array([[1.0, token]], np.float32),
        )

    row: dict[str, object] = {}
    agreement(row, [answer(2, 0.5), answer(3, 0.25)], [answer(2, 0.5), answer(4, 0.5)], exact=False)
    assert row == {"answers": 2, "answers_equal": 1, "kept_sets_equal": 1, "scores_error": 0.25, "logits_error": 0.25}
    with pytest.raises(RuntimeError, match="1 of 1 answers are not those of the CPU"):
        agreement(row, [answer(3, 0.5)], [answer(4, 0.5)], exact=True)
    assert (row["answers"], row["answers_equal"]) == (1, 0)


def test_a_row_that_failed_is_told_in_the_table():
    results = {"model": "tiny-vlm", "dtypes": [{"dtype": "bfloat16", "failed": "BackendError: a | b"}]}
    outcome = {"status": "failed", "reason": "1 of 1 dtypes", "seconds": 1.0, "results": results}
    table = markdown({"rehearsal": None, "phases": {"tiny": outcome}})
    assert "| tiny | failed: 1 of 1 dtypes | 1 |" in table
    assert "FAILED: BackendError: a \\| b" in table


def test_files_survive_being_packed_into_parts(tmp_path):
    files = [tmp_path / "a-1.whl", tmp_path / "b-2.whl"]
    files[0].write_bytes(bytes(range(256)) * 9000)
    files[1].write_bytes(b"small")
    folder, out = tmp_path / "parts", tmp_path / "out"
    out.mkdir()
    parts = wheels.write_parts(files, folder, 1_000_000)
    assert len(parts) == 3 and all(part.stat().st_size <= 1_000_000 for part in parts)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in wheels.read_parts(folder, out)] == [
        hashlib.sha256(file.read_bytes()).digest() for file in files
    ]


def test_a_part_that_is_damaged_or_missing_is_named(tmp_path, capsys):
    file = tmp_path / "a-1.whl"
    file.write_bytes(b"content" * 1000)
    parts = wheels.write_parts([file], tmp_path / "parts", 8000)
    parts[1].write_bytes(b"x")
    assert wheels.unpack(tmp_path / "parts", tmp_path / "site") == 1
    assert f"{parts[1]}: damaged" in capsys.readouterr().err
    parts[1].unlink()
    assert wheels.unpack(tmp_path / "parts", tmp_path / "site") == 1
    assert f"{parts[1]}: missing" in capsys.readouterr().err
