"""What runs the three stages, ONNX Runtime or TensorRT: each is imported where a folder asks for it."""

import os
from pathlib import Path

from hawk_trt.bundle import Bundle, holds_engines
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.runtime.protocol import Backend

_THREADS = 256  # of more, ONNX Runtime makes them all before it notices, for minutes


def load_backend(
    folder: Path, device: str | None, target: str | None, threads: int | None, *, verify: bool
) -> tuple[Bundle, Backend]:
    """Load a bundle in ONNX Runtime, or an engine folder in TensorRT.

    Args:
        folder: a bundle or an engine folder.
        device: "cpu", "cuda" or "cuda:N"; None is "cpu" for a bundle and "cuda" for engines.
        target: of the graphs; None takes the best for the device.
        threads: of the CPU, for each stage in ONNX Runtime; None takes one a core.
        verify: also hash the weight files.

    Returns:
        The bundle, which for engines has no graphs, and what runs it.

    Raises:
        InvalidInput: threads is not a number of them, or given to TensorRT.
        BackendError: an unknown device, or a runtime that is not installed.
        BundleError: neither is there, it is damaged, holds no such target, or is not for this machine.
    """
    most = max(_THREADS, os.cpu_count() or 1)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most):
        raise InvalidInput(f"threads: got {threads!r}, expected an integer from 1 to {most}, at best one a core")
    if holds_engines(folder):
        from hawk_trt.engine_folder import EngineFolder

        engines = EngineFolder.load(folder, verify=verify)
        if threads is not None:
            raise InvalidInput(f"threads: got {threads}, which are ONNX Runtime's; leave them out with engines")
        try:
            from hawk_trt.runtime.tensorrt.backend import TensorRtBackend
        except ImportError as error:
            from hawk_trt.runtime.versions import missing_for_tensorrt

            raise BackendError(missing_for_tensorrt(error)) from error
        return engines.bundle, TensorRtBackend.load(engines, device or "cuda", target)
    bundle = Bundle.load(folder, verify=verify)
    try:
        from hawk_trt.runtime.onnxruntime import OnnxRuntimeBackend
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise BackendError(
            "onnxruntime: not installed. pip install onnxruntime, or onnxruntime-gpu for a GPU"
        ) from error
    return bundle, OnnxRuntimeBackend.load(bundle, device or "cpu", target, threads)
