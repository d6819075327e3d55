"""The machine of a report: its GPU, and the versions of all that takes part."""

import os
import platform
import subprocess
from importlib import metadata

from benchmarks.gpu_report.record import ROOT, Record, Setting
from hawk_trt import __version__
from hawk_trt.errors import BackendError

_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "transformers", "tensorrt", "cuda-bindings", "onnx", "numpy")


def machine(record: Record, setting: Setting) -> None:
    """Write down what this machine is."""
    packages = {name: _version(name) for name in _PACKAGES}
    record.put(
        gpu="none: a rehearsal",
        hawk_trt=__version__,
        commit=_said("git", "rev-parse", "--short", "HEAD"),
        python=platform.python_version(),
        cpu=f"{platform.machine()}, {os.cpu_count()} cores",
        nvcc=_said("nvcc", "--version").rpartition("release ")[2].partition(",")[0] or None,
        packages={name: version for name, version in packages.items() if version},
    )
    if setting.rehearse:
        return
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "PyTorch sees no CUDA device; this report needs an NVIDIA GPU and a PyTorch built for CUDA. "
            "Without one: FLAGS=--rehearse"
        )
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    record.put(
        gpu=torch.cuda.get_device_name(),
        compute_capability=f"{major}.{minor}",
        cuda=torch.version.cuda,
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        memory_gb=round(total / 1e9, 1),
        free_gb=round(free / 1e9, 1),
    )


def _said(*command: str) -> str:
    """What a command prints, nothing where it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
