"""What runs the three stages: ONNX Runtime or TensorRT, each imported where a folder asks for it."""
