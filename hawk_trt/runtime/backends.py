"""Which backend runs a folder, and loading it: a runtime is imported when it is asked for."""

from pathlib import Path

from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import ENGINES_MANIFEST, EngineFolder
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.runtime.protocol import Backend
from hawk_trt.runtime.versions import missing_for_tensorrt

BACKENDS = ("onnxruntime", "tensorrt")


def backend_for(folder: str | Path) -> str:
    """The backend that a folder is made for: TensorRT where it holds engines."""
    return "tensorrt" if (Path(folder) / ENGINES_MANIFEST).is_file() else "onnxruntime"


def load_backend(
    source: Bundle | EngineFolder, name: str, device: str | None, target: str | None, threads: int | None = None
) -> Backend:
    """Load a bundle, or the engines made from one, in a backend.

    Args:
        source: a bundle for ONNX Runtime, an engine folder for TensorRT.
        name: of the backend.
        device: "cpu", "cuda" or "cuda:N"; None is "cpu" in ONNX Runtime and "cuda" in TensorRT.
        target: of the graphs; None takes the best for the device.
        threads: of the CPU, for each stage in ONNX Runtime; None takes one a core.

    Raises:
        InvalidInput: threads is not a number of them, or given to TensorRT.
        BackendError: an unknown backend or device, or a runtime that is not installed.
        BundleError: the bundle does not hold the target, or the engines are not for this machine.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidInput(f"threads: got {threads!r}, expected an integer of at least 1")
    if name == "onnxruntime" and isinstance(source, Bundle):
        try:
            from hawk_trt.runtime.onnxruntime import OnnxRuntimeBackend
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise BackendError(
                "onnxruntime: not installed. pip install onnxruntime, or onnxruntime-gpu for a GPU"
            ) from error
        return OnnxRuntimeBackend.load(source, device or "cpu", target, threads)
    if name == "tensorrt" and isinstance(source, EngineFolder):
        if threads is not None:
            raise InvalidInput(f"threads: got {threads}, which are ONNX Runtime's; leave them out with engines")
        try:
            from hawk_trt.runtime.tensorrt.backend import TensorRtBackend
        except ImportError as error:
            raise BackendError(missing_for_tensorrt(error)) from error
        return TensorRtBackend.load(source, device or "cuda", target)
    raise BackendError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
