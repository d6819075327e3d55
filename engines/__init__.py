"""TensorRT plans from a bundle, on the GPU that is to run them: python -m engines."""
