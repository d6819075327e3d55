"""All graphs for a target, by stage."""

import onnx_ir as ir

from hawk_trt.models.family import Family
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION, LanguageConfig

from .decoder import build_decoder
from .first_layer import build_first_layer
from .graph import Weights
from .vision import GRAPHS


def build_graphs(
    family: Family,
    language: LanguageConfig,
    weights: Weights,
    dtype: str,
    target: str,
    normalization: str,
) -> dict[str, ir.Model]:
    """Build the three graphs for a target.

    Args:
        family: of the model, with its vision sizes.
        language: sizes of the language model.
        weights: places each tensor as it is asked for.
        dtype: "float32", "float16" or "bfloat16".
        target: one of hawk_trt.stages.TARGETS.
        normalization: "l2", "softmax" or "minmax", baked into the first layer.

    Returns:
        The models by stage name.
    """
    return {
        VISION: GRAPHS[family.name].build(family.vision_spec(), family.vision, dtype, target, weights),
        FIRST_LAYER: build_first_layer(language, dtype, target, normalization, weights),
        DECODER: build_decoder(language, dtype, target, weights),
    }
