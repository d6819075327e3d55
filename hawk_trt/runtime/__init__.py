"""What runs the three stages: ONNX Runtime or TensorRT."""
