"""The phases of a report. Nothing is imported here, since packages may still be missing."""

# Each phase is the function of that name in a module of this folder, and its seconds. The most telling come first.
PHASES = {
    "machine": ("machine", 60),
    "kernel": ("kernel", 150),
    "driver": ("driver", 120),
    "tiny": ("provider", 150),
    "hybrid": ("provider", 150),
    "shape_bfloat16": ("provider", 240),
    "transformers": ("transformers_peer", 120),
    "shape_float16": ("provider", 240),
    "sanitizer": ("sanitizer", 90),
    "tensorrt": ("engines", 3600),
}
