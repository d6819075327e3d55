"""The vision graphs, one file a family."""

from collections.abc import Mapping
from typing import Any, Protocol

import onnx_ir as ir

from export.graph import Weights
from export.vision.qwen2_5_vl import build_qwen2_5_vl_vision
from hawk_trt.stages import StageSpec


class VisionBuilder(Protocol):
    """Builds a family's vision graph from its spec and sizes."""

    def __call__(
        self, spec: StageSpec, vision: Mapping[str, Any], dtype: str, profile: str, weights: Weights
    ) -> ir.Model:
        """Return the graph of a profile."""


BUILDERS: dict[str, VisionBuilder] = {"qwen2_5_vl": build_qwen2_5_vl_vision}
