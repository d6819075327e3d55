"""The command python -m engines.checks.self_test: does TensorRT work on this machine, from the plugin to the answer?

In: a checkpoint, the shipped tiny one unless told otherwise. It is exported in every dtype; engines are built in every
lowering that this TensorRT has, with and without the plugin; the stages of each are compared with ONNX Runtime, then
its answers to sample questions token by token. Out: a report in Markdown to attach to an issue. Each step runs in a
process of its own, so that a crash of one is a line of the report.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hawk_trt.apps.cli.main import make_app, run_app, where_it_lies
from hawk_trt.apps.cli.models import tiny_checkpoint
from hawk_trt.apps.cli.output import note
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt import missing_for_tensorrt
from hawk_trt.stages import DTYPES, TENSORRT

from ..plugin_library import DEFAULT_PLUGIN
from ..profiles import TENSORRT_TARGETS

_PACKAGES = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "cuda-bindings", "onnx", "onnxruntime", "numpy")
_LIMITS = ("--max-visual-tokens", "1024", "--max-prompt-tokens", "1536", "--max-context", "1024")
_REASON_CHARACTERS = 600
# float16 and bfloat16 logits of two close tokens can change places; float32 must agree to the last token.
_EXACT = "float32"


@dataclass(frozen=True, slots=True)
class Ran:
    """A command: its exit status (negative: the signal that killed it), what it printed and its last words."""

    status: int
    output: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineResult:
    """A line of the report: dtype, target and plugin as name, and in words what came of each step."""

    name: str
    build: str
    stages: str
    answers: str
    passed: bool
    folder: Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 0 where everything passed, 1 where anything failed, 2 on wrong usage."""
    return run_app(make_app("python -m engines.checks.self_test", command=self_test), arguments)


def self_test(*, checkpoint: Path = tiny_checkpoint(), out: Path = Path("artifacts/self-test")) -> int:
    """Build and run engines of a small model on this machine; print a report to attach to an issue.

    Args:
        checkpoint: that is exported
        out: folder for all it makes
    """
    if find_spec("tensorrt") is None:
        raise BackendError(missing_for_tensorrt(ModuleNotFoundError(name="tensorrt")))
    results = list(_results(checkpoint, out))
    passed = bool(results) and all(result.passed for result in results)
    print(_report(results, passed=passed))
    return 0 if passed else 1


def _results(checkpoint: Path, out: Path) -> Iterator[EngineResult]:
    bundles = {dtype: out / dtype for dtype in DTYPES}
    for dtype, bundle in bundles.items():
        note(f"exporting {dtype}")
        done = _run(where_it_lies("export"), str(checkpoint), "--out", str(bundle), "--dtype", dtype)
        if done.status:
            yield EngineResult(dtype, f"export failed: {done.reason}", "", "", False, bundle)
            return
    plugins = ["none", *([str(DEFAULT_PLUGIN)] if DEFAULT_PLUGIN.is_file() else [])]
    for dtype, bundle in bundles.items():
        for target in TENSORRT_TARGETS:
            for plugin in plugins:
                word = "without plugin" if plugin == "none" else "with plugin"
                folder = out / f"{dtype}-{target}-{word.replace(' ', '-')}"
                yield _engine(f"{dtype}, {target}, {word}", checkpoint, bundle, bundles[_EXACT], folder, plugin)


def _engine(name: str, checkpoint: Path, bundle: Path, reference: Path, folder: Path, plugin: str) -> EngineResult:
    """Build one engine folder, compare its stages, then its answers."""
    note(f"{name}: building")
    target = name.split(", ")[1]
    options = ("--target", target, "--plugin", plugin, "--reference", str(reference), *_LIMITS, "--force", "--json")
    done = _run(where_it_lies("engines"), str(bundle), "--out", str(folder), *options)
    if done.status:
        if f"--target: got {TENSORRT} with TensorRT" in done.reason:
            return EngineResult(name, "not in this TensorRT", "", "", True, folder)
        return EngineResult(name, f"failed: {done.reason}", "", "", False, folder)
    built: dict[str, Any] = json.loads(done.output)
    rows = (built["verification"] or {}).get("rows", [])
    stages = f"{len(rows)} outputs right" if rows else "not compared"
    note(f"{name}: answering")
    samples = _samples(checkpoint)
    equal, reasons = 0, []
    for image, question in samples:
        prompt = ("--image", str(image), "--prompt", question, "--max-new-tokens", "16", "--json")
        got = _run("hawk_trt", "run", str(folder), *prompt)
        expected = _run("hawk_trt", "run", str(reference), *prompt)
        if got.status or expected.status:
            reasons.append(got.reason or expected.reason)
            continue
        ours, theirs = json.loads(got.output), json.loads(expected.output)
        same = ours["token_ids"] == theirs["token_ids"]
        equal += same
        if not same and name.startswith(_EXACT):
            reasons.append(f"{question} {ours['text']!r}, expected {theirs['text']!r}")
    answers = f"{equal} of {len(samples)} equal" + "".join(f"; {reason}" for reason in reasons)
    return EngineResult(name, f"built in {built['seconds']:.0f} s", stages, answers, not reasons, folder)


def _samples(checkpoint: Path) -> list[tuple[Path, str]]:
    """Pictures and questions that come with a checkpoint, none for one without."""
    path = checkpoint / "samples" / "samples.json"
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [(path.parent / entry["image"], entry["question"]) for entry in entries]


def _run(module: str, *arguments: str) -> Ran:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.strip().splitlines() if line]
    words = next((line for line in lines if line.startswith("error:")), " ".join(lines[-3:]))
    signal = f"killed by signal {-done.returncode}: " if done.returncode < 0 else ""
    return Ran(done.returncode, done.stdout, (signal + words.removeprefix("error: "))[:_REASON_CHARACTERS])


def _report(results: list[EngineResult], *, passed: bool) -> str:
    """All of it in Markdown."""
    machine: dict[str, Any] = json.loads(_run("hawk_trt", "doctor", "--json").output)
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none found"
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in _PACKAGES if machine["packages"].get(name))
    nvcc = shutil.which("nvcc") or "not on the PATH"
    # TensorRT, CUDA, driver and GPU as the first engine folder tells them
    manifests = [path for path in (result.folder / "engines.json" for result in results) if path.is_file()]
    told = json.loads(manifests[0].read_text("utf-8"))["machine"] if manifests else {}
    built_on = ["* " + ", ".join(f"{name} {value}" for name, value in told.items())] if told else []
    lines = [
        "### hawk_trt self-test",
        "",
        f"* hawk_trt {machine['hawk_trt']}, Python {machine['python']}, {machine['machine']}",
        f"* GPU: {gpus}; nvcc: {nvcc}; plugin: {'built' if DEFAULT_PLUGIN.is_file() else 'not built (make plugin)'}",
        f"* {packages}",
        *built_on,
        "",
        "| engines | build | stages against ONNX Runtime | sample answers, token by token | |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {r.name} | {_cell(r.build)} | {r.stages} | {_cell(r.answers)} | {'ok' if r.passed else 'FAILED'} |"
            for r in results
        ),
        "",
        f"**{'passed' if passed else 'FAILED'}**",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
