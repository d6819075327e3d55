"""The vision graphs, one file a family."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hawk_trt.bundle import GraphEntry

from ..graph import GraphBuilder, Value
from .internvl import internvl_entry, internvl_vision
from .qwen2_5_vl import qwen2_5_vl_entry, qwen2_5_vl_vision
from .qwen2_vl import qwen2_vl_entry, qwen2_vl_vision
from .qwen3_vl import qwen3_vl_entry, qwen3_vl_vision


class VisionGraph(NamedTuple):
    """What the export needs of a family, each from the sizes of its vision tower."""

    build: Callable[[GraphBuilder, Any], dict[str, Value]]  # adds the nodes of its vision graph, returns the outputs
    entry: Callable[[Any, str, str], GraphEntry]  # inputs and outputs of the graph in a dtype and for a target


GRAPHS: dict[str, VisionGraph] = {
    "internvl": VisionGraph(internvl_vision, internvl_entry),
    "qwen2_5_vl": VisionGraph(qwen2_5_vl_vision, qwen2_5_vl_entry),
    "qwen2_vl": VisionGraph(qwen2_vl_vision, qwen2_vl_entry),
    "qwen3_vl": VisionGraph(qwen3_vl_vision, qwen3_vl_entry),
    "qwen3_5": VisionGraph(qwen3_vl_vision, qwen3_vl_entry),  # without DeepStack
}
