"""The vision graphs, one file a family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hawk_trt.bundle import GraphEntry
from hawk_trt.models.vision_config import VisionConfig

from ..graph import GraphBuilder, Value
from .internvl import internvl_entry, internvl_vision
from .qwen2_5_vl import qwen2_5_vl_entry, qwen2_5_vl_vision
from .qwen2_vl import qwen2_vl_entry, qwen2_vl_vision
from .qwen3_vl import qwen3_vl_entry, qwen3_vl_vision

Vision = TypeVar("Vision", bound=VisionConfig)


@dataclass(frozen=True, slots=True)
class VisionGraph(Generic[Vision]):
    """What the export needs of a family."""

    # adds the nodes of its vision graph and returns the outputs, from its sizes
    build: Callable[[GraphBuilder, Vision], dict[str, Value]]
    entry: Callable[[Vision, str, str], GraphEntry]  # inputs and outputs, from its sizes, a dtype and a target


GRAPHS: dict[str, VisionGraph[Any]] = {
    "internvl": VisionGraph(internvl_vision, internvl_entry),
    "qwen2_5_vl": VisionGraph(qwen2_5_vl_vision, qwen2_5_vl_entry),
    "qwen2_vl": VisionGraph(qwen2_vl_vision, qwen2_vl_entry),
    "qwen3_vl": VisionGraph(qwen3_vl_vision, qwen3_vl_entry),
    "qwen3_5": VisionGraph(qwen3_vl_vision, qwen3_vl_entry),  # without DeepStack
}
