"""The vision graphs, one file a family."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import onnx_ir as ir

from export.graph import Weights
from export.shapes import Shapes
from export.vision.qwen2_5_vl import build_qwen2_5_vl_vision, qwen2_5_vl_shapes
from hawk_trt.stages import StageSpec


class VisionBuilder(Protocol):
    """Builds a family's vision graph from its spec and sizes."""

    def __call__(
        self, spec: StageSpec, vision: Mapping[str, Any], dtype: str, profile: str, weights: Weights
    ) -> ir.Model:
        """Return the graph of a profile."""


BUILDERS: dict[str, VisionBuilder] = {"qwen2_5_vl": build_qwen2_5_vl_vision}

# Names and shapes of all tensors of a family's vision tower, from its sizes.
SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {"qwen2_5_vl": qwen2_5_vl_shapes}
