"""All graphs of a model for a target, and every tensor that they need.

Graphs say the shape of each tensor that they ask a checkpoint for, biases included, so that a missing bias or a config
of another size is an error that names the tensor, not a wrong answer.
"""

from pathlib import Path

from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import DECODER, FIRST_LAYER, NORMALIZATIONS, PORTABLE, VISION, LanguageConfig

from .checkpoint import Checkpoint
from .contract import decoder_entry, first_layer_entry
from .decoder import decoder
from .first_layer import first_layer
from .graph import GraphBuilder
from .tensor_file import CheckpointTensor
from .vision import GRAPHS
from .weights import WeightStore


def build_graphs(
    vision: VisionConfig, language: LanguageConfig, weights: WeightStore, dtype: str, target: str, normalization: str
) -> dict[str, GraphBuilder]:
    """Build the graphs of all stages for a target: by stage name, each to be finished by model().

    weights: places each tensor as it is asked for.  dtype: "float32", "float16" or "bfloat16".  normalization: "l2",
    "softmax" or "minmax", baked into the first layer.
    """
    family = GRAPHS[vision.family]
    entries = (
        family.entry(vision, dtype, target),
        first_layer_entry(language, dtype, target),
        decoder_entry(language, dtype, target),
    )
    graphs = {entry.stage: GraphBuilder(entry, dtype, weights) for entry in entries}
    g = graphs[VISION]
    g.outputs(family.build(g, vision))
    g = graphs[FIRST_LAYER]
    g.outputs(first_layer(g, language, normalization))
    g = graphs[DECODER]
    g.outputs(decoder(g, language))
    return graphs


def inventory(language: LanguageConfig, vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model: those that its graphs ask for, and the embedding table."""
    asked = _AnyTensors(Path(), {}, {}, (), {})
    weights = WeightStore(asked, "float32")
    build_graphs(vision, language, weights, "float32", PORTABLE, NORMALIZATIONS[0])
    weights.table((language.vocab_size, language.hidden_size))
    return {name: tensor.shape for name, tensor in asked.tensors.items()}


class _AnyTensors(Checkpoint):
    """Has every tensor that it is asked for, and remembers them."""

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> CheckpointTensor:
        assert shape is not None  # graphs say it
        return self.tensors.setdefault(name, CheckpointTensor(name, self.folder, 0, 0, "float32", shape))
