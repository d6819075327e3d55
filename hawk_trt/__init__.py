"""hawk_trt: question-aware visual token pruning (HAWK) for ONNX Runtime and TensorRT."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hawk_trt.errors import HawkError
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.request import ModelInputs, PruningConfig, Request, Result, SamplingConfig

__all__ = ["HawkError", "ModelInputs", "Pipeline", "PruningConfig", "Request", "Result", "SamplingConfig"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import what is asked for by its name here: `hawk-trt --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = {"HawkError": "errors", "Pipeline": "pipeline"}
    return getattr(import_module(f"{__name__}.{modules.get(name, 'request')}"), name)
