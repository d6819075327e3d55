"""Graphs for onnxruntime-genai from a checkpoint's folder, by mobius-onnx: ... benchmarks.peers.mobius FOLDER OUT.

Its command line takes the tokenizer from the hub alone, and it names the model after its text half, which its settings
of the image processor do not know, so this calls its parts.
"""

import sys
from dataclasses import replace

from mobius import build
from mobius.integrations.ort_genai import write_ort_genai_config
from transformers import AutoConfig


def main() -> None:
    """Build, in float32."""
    checkpoint, out = sys.argv[1:]
    package = build(checkpoint, dtype="f32", execution_provider="cpu")
    package.save(out)
    package.config = replace(package.config, model_type=AutoConfig.from_pretrained(checkpoint).model_type)
    write_ort_genai_config(package, out, ep="cpu", local_config_dir=checkpoint)


if __name__ == "__main__":
    main()
