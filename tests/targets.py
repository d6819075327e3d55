"""Targets by what runs them: ONNX Runtime's CPU provider also runs cuda's graphs, if more slowly."""

from hawk_trt.stages import CPU, CUDA, PORTABLE

ON_CPU = (CPU, PORTABLE)
IN_ONNX_RUNTIME = (CPU, CUDA, PORTABLE)
