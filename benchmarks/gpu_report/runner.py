"""Runs phases, each in a process of its own, and writes the report after each."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import stub_cuda
from benchmarks.gpu_report.phases import PHASES
from benchmarks.gpu_report.record import FAILED, PASSED, ROOT, SKIPPED, Failed, Record, Setting, Skipped, write_json
from benchmarks.gpu_report.table import markdown
from hawk_trt.errors import HawkError

_PROVIDER = ("provider", "families")  # modules whose phases need ONNX Runtime's CUDA provider
_VERSION = "1.31.1"
_LAST_WORDS = 400
_REHEARSAL_FACTOR = 4


Run = Callable[[str, Setting, float, dict[str, str]], dict[str, Any]]


def run_all(phases: list[str], setting: Setting, out: Path, run: Run | None = None) -> int:
    """Run phases in turn and write the report after each.

    Args:
        phases: their names.
        setting: what each is told.
        out: the JSON file.
        run: runs one, given its seconds and what its environment has beside this one's; None takes a process.
    """
    told = {"rehearsal": setting.rehearse, "shape": setting.shape, "side": setting.side}
    report: dict[str, Any] = {**told, "phases": {}}
    if out.is_file():
        earlier = json.loads(out.read_text(encoding="utf-8"))
        report = earlier if all(earlier.get(name) == value for name, value in told.items()) else report
    stubs = _stub_environment(setting) if any(PHASES[name][0] in _PROVIDER for name in phases) else {}
    started = time.monotonic()
    for name in phases:
        left = setting.seconds - (time.monotonic() - started)
        environment = stubs if PHASES[name][0] in _PROVIDER else {}
        # the limits are a GPU's; stand-ins take longer
        seconds = min(PHASES[name][1] * (_REHEARSAL_FACTOR if setting.rehearse else 1), left)
        report["phases"][name] = (run or phase_in_a_process)(name, setting, seconds, environment)
        write_json(out, report)
        outcome = report["phases"][name]
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        print(f"{name}: {outcome['status']} after {outcome['seconds']:.0f} s{reason}", file=sys.stderr, flush=True)
        if name == "machine" and outcome["status"] == FAILED:
            break  # there is no GPU
    print(markdown(report))
    return int(any(report["phases"][name]["status"] == FAILED for name in phases if name in report["phases"]))


def _stub_environment(setting: Setting) -> dict[str, str]:
    if setting.rehearse != "stubs":
        return {}
    try:
        return stub_cuda.environment(_VERSION)
    except HawkError as error:
        print(f"the CUDA provider is rehearsed on the CPU: {error}", file=sys.stderr)
        return {}


def phase_in_a_process(name: str, setting: Setting, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run one phase; its status, reason, seconds and results."""
    if seconds <= 0:
        return {"status": SKIPPED, "reason": "no time was left", "seconds": 0.0, "results": {}}
    path, log = _result_path(name, setting), setting.work / f"{name}.log"
    path.unlink(missing_ok=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--phase", name, "--work", str(setting.work.resolve())]
    command += ["--shape", setting.shape, "--side", str(setting.side)]
    command += ["--seconds", str(seconds), *(["--rehearse", setting.rehearse] if setting.rehearse else [])]
    begun = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    outcome = told.pop("outcome", None) or {"status": FAILED, "reason": _last_words(log)}
    if status is None:
        outcome = {"status": FAILED, "reason": f"cut after {seconds:.0f} s"}
    elif status < 0:
        outcome = {"status": FAILED, "reason": f"killed by {signal.Signals(-status).name}: {_last_words(log)}"}
    return {**outcome, "seconds": round(time.monotonic() - begun, 1), "results": told}


def run_phase(name: str, setting: Setting) -> dict[str, Any]:
    """Run a phase here: its outcome. What it does not foresee is raised."""
    record = Record(_result_path(name, setting))
    status, reason = PASSED, None
    try:
        getattr(importlib.import_module(f"benchmarks.gpu_report.{PHASES[name][0]}"), name)(record, setting)
    except Skipped as why:
        status, reason = SKIPPED, str(why)
    except (Failed, HawkError) as why:
        status, reason = FAILED, str(why)
    outcome = {"status": status, "reason": reason}
    record.put(outcome=outcome)
    return outcome


def _result_path(name: str, setting: Setting) -> Path:
    return setting.work / f"{name}.json"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:_LAST_WORDS]} ({log})" if lines else f"it said nothing ({log})"
