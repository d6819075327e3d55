"""This machine as plans see it: GPU, driver, CUDA and TensorRT. Needs cuda-bindings and a GPU, but no CUDA context."""

import re
from pathlib import Path

from hawk_trt.engine_folder import Machine
from hawk_trt.errors import BackendError

_NAME_BYTES = 256
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def this_machine(tensorrt: str, device: int = 0) -> Machine:
    """Ask the driver about one GPU.

    Args:
        tensorrt: version of the library in use.
        device: number of the GPU.

    Raises:
        BackendError: no cuda-bindings, no driver, or no such GPU.
    """
    try:
        from cuda.bindings import driver  # TensorRT alone needs it
    except ImportError as error:
        raise BackendError(
            "cuda-bindings: not installed, and TensorRT is driven through it. "
            "pip install 'cuda-bindings==12.*' for CUDA 12 (JetPack 6), 'cuda-bindings==13.*' for CUDA 13"
        ) from error

    def call(function: str, *arguments: object) -> tuple[object, ...]:
        try:
            status, *values = getattr(driver, function)(*arguments)
        except RuntimeError as error:  # cuda-bindings raises it where it finds no driver library
            raise BackendError("GPU: no NVIDIA driver (libcuda) was found. See: hawk-trt doctor") from error
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"GPU {device}: {function} failed with {status.name}. See: hawk-trt doctor")
        return tuple(values)

    call("cuInit", 0)
    (handle,) = call("cuDeviceGet", device)
    (name,) = call("cuDeviceGetName", _NAME_BYTES, handle)
    attribute = driver.CUdevice_attribute
    major, minor = (
        call("cuDeviceGetAttribute", number, handle)[0]
        for number in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    (cuda,) = call("cuDriverGetVersion")
    assert isinstance(name, bytes) and isinstance(cuda, int)
    return Machine(
        tensorrt=tensorrt,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=_driver_version(),
        gpu=name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
    )


def _driver_version() -> str | None:
    """Version of the kernel driver, None where it is not told."""
    try:
        found = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group(1) if found else None
