"""The vision graphs, one file a family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hawk_trt.models.vision_config import VisionConfig

from ..contract import StageSpec
from ..graph import GraphBuilder
from ..onnx_graph import Value
from ..tensors import Shapes
from .internvl import internvl_shapes, internvl_spec, internvl_vision
from .qwen2_5_vl import qwen2_5_vl_shapes, qwen2_5_vl_spec, qwen2_5_vl_vision
from .qwen2_vl import qwen2_vl_shapes, qwen2_vl_spec, qwen2_vl_vision
from .qwen3_vl import qwen3_vl_shapes, qwen3_vl_spec, qwen3_vl_vision

Vision = TypeVar("Vision", bound=VisionConfig)


@dataclass(frozen=True, slots=True)
class VisionGraph(Generic[Vision]):
    """What the export needs of a family."""

    # adds the nodes of its vision graph and returns the outputs, from its sizes and the inputs
    build: Callable[[GraphBuilder, Vision, dict[str, Value]], dict[str, Value]]
    shapes: Callable[[Vision], Shapes]  # names and shapes of all tensors of its vision tower, from its sizes
    spec: Callable[[Vision], StageSpec]  # inputs and outputs of its vision graph, from its sizes


GRAPHS: dict[str, VisionGraph[Any]] = {
    "internvl": VisionGraph(internvl_vision, internvl_shapes, internvl_spec),
    "qwen2_5_vl": VisionGraph(qwen2_5_vl_vision, qwen2_5_vl_shapes, qwen2_5_vl_spec),
    "qwen2_vl": VisionGraph(qwen2_vl_vision, qwen2_vl_shapes, qwen2_vl_spec),
    "qwen3_vl": VisionGraph(qwen3_vl_vision, qwen3_vl_shapes, qwen3_vl_spec),
    "qwen3_5": VisionGraph(qwen3_vl_vision, qwen3_vl_shapes, qwen3_vl_spec),  # without DeepStack
}
