"""The ONNX graph as TensorRT gets it: an in-memory copy, its weights left where they are.

    plugin asked for   the body of hawk::WeightedTopK is dropped, so that a missing plugin is an error and not a
                       silent fall back to TopK; TensorRT below 10.7 would prefer the body anyway
    cache_len          becomes a number, since TensorRT's KV cache is static
    Attention          TRT_decomposable lets TensorRT fall back to its parts where it has no fused kernel; float16 is
                       cast to float32 around it where that makes the fused kernel add up in float32 (from 11.3 on)

The builder and the preflight both build from this. But for TRT_decomposable, which ONNX Runtime refuses, and that sum,
the prepared graph computes the same in ONNX Runtime as the bundle's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import helper

from hawk_trt.bundle import Bundle, TensorEntry
from hawk_trt.runtime.versions import at_least
from hawk_trt.stages import CACHE_LEN

PLUGIN_OP = "WeightedTopK"
DECOMPOSABLE = "TRT_decomposable"
_FLOAT32_SUMS_TENSORRT = "11.3"


@dataclass(frozen=True, slots=True)
class PreparedGraph:
    """One stage, ready for TensorRT's parser; dynamic dimensions of inputs and outputs by their word."""

    stage: str
    file: Path  # of the bundle; the parser finds the weights beside it
    xxh3: str  # of that file
    content: bytes  # the serialized model, its weights external
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    weight_bytes: int
    has_topk: bool  # hawk::WeightedTopK, which the plugin is for
    has_float8: bool  # weights


def prepare(
    bundle: Bundle, stage: str, target: str, *, max_context: int, plugin: bool, tensorrt: str | None = None
) -> PreparedGraph:
    """Prepare the graph of a stage for a version of TensorRT, None for what all versions take.

    max_context is the length of the static cache (target tensorrt); plugin, whether the top-k plugin is to be used.
    """
    entry = bundle.manifest.graph(stage, target)
    file = bundle.folder / entry.file
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    if plugin:
        del model.functions[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CACHE_LEN:
                dim.dim_value = max_context
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    if bundle.manifest.dtype == "float16" and tensorrt is not None and at_least(tensorrt, _FLOAT32_SUMS_TENSORRT):
        _sum_in_float32(graph)
    return PreparedGraph(
        stage=stage,
        file=file,
        xxh3=bundle.manifest.files[entry.file].xxh3,
        content=model.SerializeToString(),
        inputs=_baked(entry.inputs, max_context),
        outputs=_baked(entry.outputs, max_context),
        weight_bytes=sum(
            int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"
        ),
        has_topk=any(node.op_type == PLUGIN_OP for node in graph.node),
        has_float8=any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer),
    )


def _sum_in_float32(graph: onnx.GraphProto) -> None:
    """Cast the queries, keys and values of every Attention to float32, and its output back to float16."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Attention":
            graph.node.append(node)
            continue
        for index, letter in enumerate("qkv"):
            name = f"{node.name}/{letter}_float32"
            graph.node.append(helper.make_node("Cast", [node.input[index]], [name], name, to=onnx.TensorProto.FLOAT))
            node.input[index] = name
        output, node.output[0] = node.output[0], f"{node.name}/float32"
        back = helper.make_node("Cast", [node.output[0]], [output], f"{node.name}/back", to=onnx.TensorProto.FLOAT16)
        graph.node.extend((node, back))


def _baked(entries: Iterable[TensorEntry], max_context: int) -> tuple[TensorEntry, ...]:
    return tuple(
        replace(entry, shape=tuple(max_context if size == CACHE_LEN else size for size in entry.shape))
        for entry in entries
    )
