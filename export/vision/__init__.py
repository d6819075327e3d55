"""The vision graphs, one file a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx_ir as ir

from hawk_trt.errors import CheckpointError
from hawk_trt.models.registry import family_of
from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.stages import StageSpec

from ..graph import Weights
from ..tensors import Shapes, qwen_names
from ..vision.internvl import build_internvl_vision, internvl_names, internvl_shapes
from ..vision.qwen2_5_vl import build_qwen2_5_vl_vision, qwen2_5_vl_shapes
from ..vision.qwen2_vl import build_qwen2_vl_vision, qwen2_vl_shapes
from ..vision.qwen3_vl import build_qwen3_vl_vision, qwen3_vl_shapes

Vision = TypeVar("Vision", bound=VisionConfig)


@dataclass(frozen=True, slots=True)
class VisionGraph(Generic[Vision]):
    """What the export needs of a family.

    Attributes:
        build: makes its vision graph from inputs and outputs, sizes, dtype, profile and weights.
        shapes: names and shapes of all tensors of its vision tower, from its sizes.
        names: canonical names of a tensor of the checkpoint; see export.tensors.
    """

    build: Callable[[StageSpec, Vision, str, str, Weights], ir.Model]
    shapes: Callable[[Vision], Shapes]
    names: Callable[[str], tuple[str, ...]] = qwen_names


GRAPHS: dict[str, VisionGraph[Any]] = {
    "internvl": VisionGraph(build_internvl_vision, internvl_shapes, internvl_names),
    "qwen2_5_vl": VisionGraph(build_qwen2_5_vl_vision, qwen2_5_vl_shapes),
    "qwen2_vl": VisionGraph(build_qwen2_vl_vision, qwen2_vl_shapes),
    "qwen3_vl": VisionGraph(build_qwen3_vl_vision, qwen3_vl_shapes),
}


def tensor_names(config: Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """How the tensors of a checkpoint are named; those of an unknown architecture as Qwen's."""
    try:
        return GRAPHS[family_of(config).name].names
    except CheckpointError:  # what is not supported is refused where its sizes are read
        return qwen_names
