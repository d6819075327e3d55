"""Which version of which package can do what, what to install, and how much memory is free: the one place that knows.

The doctor, the backends and the engine builder ask here. Versions are text such as "10.16.1.11" or "2.13.0+cpu".
"""

import re
from pathlib import Path

# The first ONNX Runtime that fuses DequantizeLinear with MatMul for int8 as for int4, with a bias as without.
QUANTISED_ONNX_RUNTIME = "1.25"
# The first of each with Attention, TensorScatter, RotaryEmbedding and RMSNormalization, for cuda's graphs with causal
# attention over a cache that is partly written; older ones run portable graphs.
OPSET_24_ONNX_RUNTIME = {"cpu": "1.25", "cuda": "1.28"}
OPSET_24_TENSORRT = "10.15"
# The first that copies a tensor into another on the device; every KV cache on a GPU needs it.
DEVICE_COPIES_ONNX_RUNTIME = "1.26"
_INSTALL_CUDA_BINDINGS = (
    "cuda-bindings: not installed, and TensorRT is driven through it. "
    "pip install 'cuda-bindings==12.*' for CUDA 12 (JetPack 6), 'cuda-bindings==13.*' for CUDA 13"
)
_INSTALL_TENSORRT = (
    "tensorrt: not installed. On a Jetson it is part of JetPack (apt install python3-libnvinfer), and a virtual "
    "environment sees it when made with --system-site-packages. On other GPUs: pip install 'tensorrt>=10.3'"
)


def extras() -> dict[str, dict[str, str]]:
    """Packages by extra of hawk-trt, "" for none, and the lowest that work; empty where it is not installed."""
    from importlib.metadata import PackageNotFoundError, requires  # a twentieth of a start

    found: dict[str, dict[str, str]] = {}
    try:
        requirements = requires("hawk-trt") or []
    except PackageNotFoundError:
        return found
    for requirement in requirements:
        package = re.match(r"([\w-]+)[^;>]*>=([\d.]+)", requirement)
        extra = re.search(r"extra == [\"']([\w-]+)", requirement)
        if package:
            found.setdefault(extra[1] if extra else "", {})[package[1]] = package[2]
    return found


def at_least(found: str, lowest: str) -> bool:
    """Whether a version reaches another, by their leading numbers: "2.13.0+cpu" reaches "2.6"."""
    return _numbers(found) >= _numbers(lowest)


def up_to(found: str, highest: str) -> bool:
    """Whether a version is within another as far as that is told: "10.14.1" is within "10.14"."""
    return _numbers(found)[: len(_numbers(highest))] <= _numbers(highest)


def same_version(first: str, second: str) -> bool:
    """Whether two versions are the same as far as both say: older TensorRT packages leave the build number out."""
    return all(a == b for a, b in zip(_numbers(first), _numbers(second), strict=False))


def missing_for_tensorrt(error: ImportError) -> str:
    """What TensorRT needs and does not find here, and what brings it."""
    package = (error.name or "").partition(".")[0]
    if package == "cuda":
        return _INSTALL_CUDA_BINDINGS
    if package == "tensorrt" and isinstance(error, ModuleNotFoundError):
        return _INSTALL_TENSORRT
    return f"tensorrt: cannot be loaded ({error}). Its libraries must be of one version and on the loader's path"


def available_memory_bytes() -> int | None:
    """Main memory that a process could take without swapping, None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _numbers(text: str) -> tuple[int, ...]:
    release = re.split(r"[^\d.]", text, maxsplit=1)[0]
    return tuple(int(number) for number in release.split(".") if number)
