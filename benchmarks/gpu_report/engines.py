"""TensorRT: the project's self-test, then engines of the same shape at the same keep ratios as ONNX Runtime.

A rehearsal takes stand-ins of TensorRT and the driver, and engines of the tiny model that they run on the CPU.
"""

import importlib.util
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gpu_report import models, stages
from benchmarks.gpu_report.provider import memory_meter
from benchmarks.gpu_report.record import ROOT, Failed, Record, Setting, Skipped
from hawk_trt.errors import BackendError
from hawk_trt.stages import TENSORRT

_DTYPE = "bfloat16"
_TEXT_TOKENS = 240  # room for the words of the prompt, and for its answer


def tensorrt(record: Record, setting: Setting) -> None:
    """The self-test's report, and the stages of engines."""
    if not setting.rehearse and importlib.util.find_spec("tensorrt") is None:
        raise Skipped("tensorrt is not installed")
    passed = setting.rehearse is not None or _self_test(record, setting)
    with ExitStack() as stack:
        if setting.rehearse:
            sys.path.insert(0, str(ROOT / "tests"))  # the stand-ins
            import trt_machine

            folder = trt_machine.engine_folder(
                models.tiny_bundle("float16", setting), setting.work / "engines-tiny", TENSORRT
            )
            stack.enter_context(trt_machine.Machines())
        else:
            folder = _build(record, setting)
        _stages(folder, record, setting)
    record.raise_failures("stages")
    if not passed:
        raise Failed("the self-test; its report says what")


def _self_test(record: Record, setting: Setting) -> bool:
    command = [sys.executable, "-m", "engines.checks.self_test", "--out", str(setting.work / "self-test")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    record.put(self_test=done.stdout)
    return done.returncode == 0


def _build(record: Record, setting: Setting) -> Path:
    bundle, folder = models.shape_bundle(_DTYPE, setting), setting.work / f"{setting.shape}-engines"
    begun = time.perf_counter()
    command = [sys.executable, "-m", "engines", str(bundle), "--out", str(folder), "--force"]
    visual = (setting.side // 28) ** 2
    command += ["--max-visual-tokens", str(visual)]
    command += ["--max-prompt-tokens", str(visual + _TEXT_TOKENS), "--max-context", str(visual + _TEXT_TOKENS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"engines: {done.stderr.strip()[-400:]}")
    record.put(build_s=round(time.perf_counter() - begun))
    return folder


def _stages(folder: Path, record: Record, setting: Setting) -> None:
    from hawk_trt import Pipeline

    used_mb = memory_meter(setting)
    with Pipeline.load(folder, vision_cache_mb=0) as pipe:
        record.put(
            model="tiny-vlm" if setting.rehearse else models.model_name(setting),
            dtype=pipe.bundle.manifest.dtype,
            weights_mb=round(used_mb()),
        )
        inputs = stages.noise_prompt(pipe, 224 if setting.rehearse else setting.side)
        for ratio in stages.KEEP_RATIOS:
            with record.row_or_reason("stages", keep_ratio=ratio) as row:
                row |= stages.measure(pipe, inputs, ratio, used_mb, setting)
