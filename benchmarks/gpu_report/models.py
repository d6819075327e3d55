"""The bundles that phases run: the shipped tiny models in every dtype, and a released shape of random weights."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_report.record import ROOT, Setting
from hawk_trt.errors import BackendError

CHECKPOINT = ROOT / "examples" / "tiny-vlm"
HYBRID = ROOT / "examples" / "tiny-hybrid"
_CUT = ("--layers", "2", "--vision-layers", "1")  # in a rehearsal


def tiny_bundle(dtype: str, setting: Setting, checkpoint: Path = CHECKPOINT) -> Path:
    """A tiny model's bundle; int4 and int8 with float16 activations, which the CUDA provider multiplies by."""
    activations = ["--activations", "float16"] if dtype.startswith("int") else []
    out = setting.work / f"{checkpoint.name}-{dtype}"
    return _export([str(checkpoint), "--dtype", dtype, *activations], out, here=setting.small)


def shape_bundle(dtype: str, setting: Setting) -> Path:
    """Random weights of the setting's shape: cut to a few layers in a rehearsal, the tiny model's in a small one."""
    if setting.small:
        return tiny_bundle(dtype, setting)
    cut = _CUT if setting.rehearse else ()
    out = setting.work / f"{setting.shape}-{dtype}{len(cut) or ''}"
    return _export(["--shape", setting.shape, *cut, "--dtype", dtype], out, here=False)


def model_name(setting: Setting) -> str:
    """What shape_bundle makes, for the table."""
    cut = "2 language and 1 vision layers, " if setting.rehearse else ""
    return "tiny-vlm" if setting.small else f"{setting.shape}, {cut}random weights"


def config(setting: Setting) -> dict[str, object]:
    """config.json of what shape_bundle makes."""
    from export.real_shapes import shape_config

    if setting.small:
        return json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    return shape_config(setting.shape, *((2, 1) if setting.rehearse else ()))


def _export(arguments: list[str], out: Path, *, here: bool) -> Path:
    """A bundle by the export command, which leaves one that is up to date as it is.

    Args:
        arguments: of the command.
        out: the bundle.
        here: run it in this process; a large one would leave its memory in what is measured.
    """
    arguments = [*arguments, "--no-reference", "--out", str(out)]
    if here:
        from export.__main__ import main

        if main(arguments) != 0:
            raise BackendError("export: failed; its reason is above")
        return out
    command = [sys.executable, "-m", "export", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"export: {done.stderr.strip()[-400:]}")
    return out
