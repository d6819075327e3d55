"""Offline 1: a Hugging Face checkpoint becomes an ONNX bundle. No torch, no GPU, weights streamed."""
