"""The TensorRT backend: an engine folder's plans on one GPU. Needs tensorrt and cuda-bindings, and no torch.

backend.py     TensorRtBackend: load, encode, score, prefill, decode, close
vision.py      the vision stage: feeds in, visual rows where the first layer reads them
decode.py      the decode step over the slots in use, replayed as a CUDA graph where its shapes stand still
cache.py       the KV cache, in place or portable: slots, and the rows that have them
states.py      beside it the states of linear layers
memory.py      what lies where on the GPU: one allocation for the largest request
engine.py      plans, execution contexts, shapes and addresses; what TensorRT says, kept for error messages
cuda.py        the CUDA driver: memory, copies through pinned memory, events, graphs
"""

_INSTALL_CUDA_BINDINGS = (
    "cuda-bindings: not installed, and TensorRT is driven through it. "
    "pip install 'cuda-bindings==12.*' for CUDA 12 (JetPack 6), 'cuda-bindings==13.*' for CUDA 13"
)
_INSTALL_TENSORRT = (
    "tensorrt: not installed. On a Jetson it is part of JetPack (apt install python3-libnvinfer), and a virtual "
    "environment sees it when made with --system-site-packages. On other GPUs: pip install 'tensorrt>=10.3'"
)


def missing_for_tensorrt(error: ImportError) -> str:
    """What TensorRT needs and does not find here, and what brings it."""
    package = (error.name or "").partition(".")[0]
    if package == "cuda":
        return _INSTALL_CUDA_BINDINGS
    if package == "tensorrt" and isinstance(error, ModuleNotFoundError):
        return _INSTALL_TENSORRT
    return f"tensorrt: cannot be loaded ({error}). Its libraries must be of one version and on the loader's path"
