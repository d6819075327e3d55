"""Configs of released models by name, so that models of their shapes can be made without their weights.

The names are those of `python -m export --shape`; hawk_trt/data/shapes has the sizes that the checkpoints' own
config.json files tell.
"""

import json
from importlib import resources
from typing import Any

from hawk_trt.errors import InvalidInput

SHAPES = (
    *("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-32b", "qwen2.5-vl-72b"),
    "qwen3-vl-2b",
    *("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b"),
)


def shape_config(shape: str, layers: int | None = None, vision_layers: int | None = None) -> dict[str, Any]:
    """config.json of a released model, with fewer layers where asked for.

    The last of fewer vision layers attends over whole frames, as the last of all does. Where none is left that feeds
    DeepStack, the first does. Of a hybrid model two layers of full attention are left at least.

    shape: one of SHAPES.  layers, vision_layers: of the language model and of the vision tower; None takes all.
    InvalidInput for an unknown name, or a number of layers that the model does not have.
    """
    if shape not in SHAPES:
        raise InvalidInput(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    file = resources.files("hawk_trt") / "data" / "shapes" / f"{shape}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    for name, got, part, key, least in (
        ("layers", layers, text, "num_hidden_layers", 2 * text.get("full_attention_interval", 1)),
        ("vision-layers", vision_layers, vision, "depth", 1),
    ):
        if got is not None and not least <= got <= part[key]:
            raise InvalidInput(f"{name}: got {got}, expected {least} to {part[key]}, as many as {shape} has")
        part[key] = got or part[key]
    depth = vision["depth"]
    if whole := vision.get("fullatt_block_indexes"):
        vision["fullatt_block_indexes"] = sorted({*(index for index in whole if index < depth), depth - 1})
    if levels := vision.get("deepstack_visual_indexes"):
        vision["deepstack_visual_indexes"] = [index for index in levels if index < depth] or [0]
    return config
