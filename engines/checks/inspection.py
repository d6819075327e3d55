"""How much of the attention in some plans is fused, by TensorRT's engine inspector. Needs the GPU that runs them.

In: the plans. Out: of each stage how many attentions run in one fused kernel, and how many in separate ones, which keep
a score tensor. TensorRT calls its fused kernels mha (_gemm_mha_v2, _gemv_mha_v1), and says of each layer which nodes of
the ONNX graph went into it: "[ONNX Layer: layers.3/self_attn/softmax]".
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from hawk_trt.engine_folder import EngineFolder

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# The node that every attention has: the operator, or the softmax between its products.
_ATTENTION = re.compile(r"(?:^|/)(?:softmax|Attention)(?:\.\d+)?$")
# Each optimization profile has its layers; the first profile's names have no such end.
_LATER_PROFILE = re.compile(r"\[profile [1-9]\d*\]$")
_FUSED = "mha"


@dataclass(frozen=True, slots=True)
class Fusion:
    """Attentions of one plan, in its first optimization profile."""

    fused: int
    decomposed: int

    def __str__(self) -> str:
        return f"attention: {self.fused} fused, {self.decomposed} decomposed"


def attention_fusion(information: str) -> Fusion:
    """Count the attentions in the inspector's JSON, whose Layers are objects where the plan keeps details."""
    layers: list[Any] = json.loads(information).get("Layers", [])
    fused: dict[str, bool] = {}
    for layer in layers:
        if not isinstance(layer, dict) or _LATER_PROFILE.search(layer.get("Name", "")):
            continue
        kernel = f"{layer.get('Name', '')} {layer.get('TacticName', '')}".lower()
        for node in _NODE.findall(layer.get("Metadata", "")):
            if _ATTENTION.search(node):
                fused[node] = fused.get(node, False) or _FUSED in kernel
    return Fusion(sum(fused.values()), len(fused) - sum(fused.values()))


def inspect(engines: EngineFolder) -> dict[str, Fusion]:
    """Of each stage; the plans are loaded for it."""
    import tensorrt as trt

    from hawk_trt.runtime.tensorrt.engine import Engine, load_plans  # needs tensorrt

    def layers(plan: Engine) -> str:
        """What TensorRT made of the graph, in the JSON of its engine inspector."""
        inspector = None if plan.loaded is None else plan.loaded.create_engine_inspector()
        if inspector is None:
            raise plan.refused("an engine inspector")
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    plans = load_plans(engines)
    try:
        return {stage: attention_fusion(layers(plan)) for stage, plan in plans.items()}
    finally:
        for plan in plans.values():
            plan.close()
