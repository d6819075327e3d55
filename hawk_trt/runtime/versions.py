"""Which version of which package can do what, and how much memory is free: the one place that knows.

The doctor, the backends and the engine builder ask here. Versions are text such as "10.16.1.11" or "2.13.0+cpu".
"""

import re
from pathlib import Path

# The first ONNX Runtime that fuses DequantizeLinear with MatMul for int8 as for int4, with a bias as without.
QUANTISED_ONNX_RUNTIME = "1.25"
# The first of each with Attention, TensorScatter, RotaryEmbedding and RMSNormalization as the graphs have them; older
# ones run portable graphs.
OPSET_24_ONNX_RUNTIME = {"cpu": "1.25", "cuda": "1.28"}
OPSET_24_TENSORRT = "10.15"
# The first that copies a tensor into another on the device; every KV cache on a GPU needs it.
DEVICE_COPIES_ONNX_RUNTIME = "1.26"


def at_least(found: str, lowest: str) -> bool:
    """Whether a version reaches another, by their leading numbers: "2.13.0+cpu" reaches "2.6"."""
    return _numbers(found) >= _numbers(lowest)


def up_to(found: str, highest: str) -> bool:
    """Whether a version is within another as far as that is told: "10.14.1" is within "10.14"."""
    return _numbers(found)[: len(_numbers(highest))] <= _numbers(highest)


def same_version(first: str, second: str) -> bool:
    """Whether two versions are the same as far as both say: older TensorRT packages leave the build number out."""
    return all(a == b for a, b in zip(_numbers(first), _numbers(second), strict=False))


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
