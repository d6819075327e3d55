"""hawk_trt: question-aware visual token pruning (HAWK) for ONNX Runtime and TensorRT."""

from hawk_trt.errors import HawkError
from hawk_trt.pipeline import Pipeline
from hawk_trt.request import ModelInputs, PruningConfig, Request, Result, SamplingConfig

__all__ = ["HawkError", "ModelInputs", "Pipeline", "PruningConfig", "Request", "Result", "SamplingConfig"]
__version__ = "0.1.0"
