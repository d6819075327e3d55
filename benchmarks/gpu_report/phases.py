"""The phases of a report, and what they measure. Nothing is imported here, since packages may still be missing."""

# Random weights have one of these shapes, the first unless told otherwise, and see a square image of so many pixels a
# side: 28 x 28 of them are a token.
SHAPES = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
SIDE = 1008

# Each phase is the function of that name in a module of this folder, and its seconds. The most telling come first.
PHASES = {
    "machine": ("machine", 60),
    "kernel": ("kernel", 150),
    "driver": ("driver", 120),
    "tiny": ("provider", 150),
    "hybrid": ("provider", 150),
    "families": ("families", 150),
    "shape_bfloat16": ("provider", 240),
    "transformers": ("transformers_peer", 120),
    "shape_float16": ("provider", 240),
    "sanitizer": ("sanitizer", 90),
    "tensorrt": ("engines", 3600),
}
