"""How examples/tiny-vlm was trained: python -m examples.tiny_training --out DIR."""
