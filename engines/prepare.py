"""The ONNX graph as TensorRT gets it: an in-memory copy, its weights left where they are.

    plugin asked for   the body of hawk::WeightedTopK is dropped, so that a missing plugin is an error and not a
                       silent fall back to TopK; TensorRT below 10.7 would prefer the body anyway
    inplace            cache_len becomes a number, since TensorRT's KV cache is static, and the input context_slots
                       is added: attention reads only as many columns of the cache as it is long
    FrameAttention     attention that TensorRT fuses, in place of the loop over tiles that ONNX Runtime runs
    tiles of tokens    the token-wise parts of a vision tower without the Scan that bounds ONNX Runtime's memory
    Attention          TRT_decomposable lets TensorRT fall back to its parts where it has no fused kernel

The builder and the preflight both build from this. But for TRT_decomposable, which ONNX Runtime refuses, the
prepared graph computes the same in ONNX Runtime as the bundle's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import helper

from hawk_trt.bundle import Bundle, TensorEntry
from hawk_trt.errors import BundleError
from hawk_trt.stages import CONTEXT_SLOTS, INPLACE

PLUGIN_OP = "WeightedTopK"
FRAME_ATTENTION_OP = "FrameAttention"
TILE_SCOPE = "token_tiles/"
CACHE_LEN = "cache_len"
CONTEXT_LEN = "context_len"
DECOMPOSABLE = "TRT_decomposable"
_COLUMN_AXIS = 2


@dataclass(frozen=True, slots=True)
class PreparedGraph:
    """One stage, ready for TensorRT's parser.

    Attributes:
        stage: vision, first_layer or decoder.
        file: of the bundle; the parser finds the weights beside it.
        sha256: of that file.
        content: the serialized model, its weights external.
        inputs: dynamic dimensions by their word.
        outputs: likewise.
        weight_bytes: size of the weights that it reads.
        has_topk: whether it holds hawk::WeightedTopK, which the plugin is for.
    """

    stage: str
    file: Path
    sha256: str
    content: bytes
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    weight_bytes: int
    has_topk: bool


def prepare(bundle: Bundle, stage: str, profile: str, *, max_context: int, plugin: bool) -> PreparedGraph:
    """Prepare the graph of a stage.

    Args:
        bundle: that holds it.
        stage: vision, first_layer or decoder.
        profile: the lowering, "portable" or "inplace".
        max_context: length of the static cache (inplace).
        plugin: whether the top-k plugin is to be used.

    Raises:
        BundleError: the bundle does not hold the profile, or its graph is not one that this version exports.
    """
    entry = bundle.manifest.graph(stage, profile)
    file = bundle.folder / entry.file
    model = onnx.load(file, load_external_data=False)
    _unroll_tiles(model.graph, file)
    _fuse_frame_attention(model, attention_op=profile == INPLACE)
    if plugin:
        del model.functions[:]
    graph = model.graph
    inputs = entry.inputs
    caches = {tensor.name for tensor in inputs if CACHE_LEN in tensor.shape}
    if caches:
        _bake((*graph.input, *graph.output), max_context)
        slots = TensorEntry(CONTEXT_SLOTS, "int64", (CONTEXT_LEN,))
        graph.input.append(helper.make_tensor_value_info(slots.name, onnx.TensorProto.INT64, slots.shape))
        _read_used_columns(graph, caches, file)
        inputs = (*inputs, slots)
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    return PreparedGraph(
        stage=stage,
        file=file,
        sha256=bundle.manifest.files[entry.file].sha256,
        content=model.SerializeToString(),
        inputs=_baked(inputs, max_context),
        outputs=_baked(entry.outputs, max_context),
        weight_bytes=sum(_external_bytes(tensor) for tensor in graph.initializer),
        has_topk=any(node.op_type == PLUGIN_OP for node in graph.node),
    )


def _unroll_tiles(graph: onnx.GraphProto, file: Path) -> None:
    """Run once what the exporter put into a loop over tiles of tokens: Pad, Reshape, Scan, Reshape, Slice."""
    makers = {output: node for node in graph.node for output in node.output}
    readers = {source: node for node in graph.node for source in node.input}
    loops = [node for node in graph.node if node.op_type == "Scan"]
    gone: set[str] = set()
    bodies: dict[str, list[onnx.NodeProto]] = {}
    for loop in loops:
        cut = makers[loop.input[0]]
        padded = makers[cut.input[0]]
        joined = [readers[output] for output in loop.output]
        outputs = [readers[node.output[0]] for node in joined]
        around = [padded, cut, *joined, *outputs]
        if {node.op_type for node in around} != {"Pad", "Reshape", "Slice"}:
            raise BundleError(f"{file}: {loop.name} is no loop of this version. Export again: make export")
        gone |= {node.name for node in around}
        (body,) = (entry.g for entry in loop.attribute if entry.name == "body")
        outer = {body.input[0].name: padded.input[0]}
        outer |= {inner.name: node.output[0] for inner, node in zip(body.output, outputs, strict=True)}
        for node in body.node:
            node.input[:] = [outer.get(name, name) for name in node.input]
            node.output[:] = [outer.get(name, name) for name in node.output]
        bodies[loop.name] = list(body.node)
    left = [node for node in graph.node if node.name not in gone and not node.name.startswith(TILE_SCOPE)]
    nodes = [inner for node in left for inner in bodies.get(node.name, [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def _fuse_frame_attention(model: onnx.ModelProto, *, attention_op: bool) -> None:
    """Put attention that TensorRT can fuse in place of hawk::FrameAttention, whose body is a loop over tiles."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != FRAME_ATTENTION_OP:
            nodes.append(node)
            continue
        (query, key, value), (out,) = node.input, node.output
        if attention_op:
            nodes.append(helper.make_node("Attention", [query, key, value], [out], name=node.name, scale=1.0))
            continue
        columns, scores, weights = (f"{node.name}/{part}" for part in ("key_columns", "scores", "softmax"))
        nodes += [
            helper.make_node("Transpose", [key], [columns], name=columns, perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [query, columns], [scores], name=scores),
            helper.make_node("Softmax", [scores], [weights], name=weights, axis=-1),
            helper.make_node("MatMul", [weights, value], [out], name=f"{node.name}/output"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [function for function in model.functions if function.name != FRAME_ATTENTION_OP]
    del model.functions[:]
    model.functions.extend(kept)


def _bake(values: Iterable[onnx.ValueInfoProto], max_context: int) -> None:
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CACHE_LEN:
                dim.dim_value = max_context


def _baked(entries: Iterable[TensorEntry], max_context: int) -> tuple[TensorEntry, ...]:
    return tuple(
        replace(entry, shape=tuple(max_context if size == CACHE_LEN else size for size in entry.shape))
        for entry in entries
    )


def _read_used_columns(graph: onnx.GraphProto, caches: set[str], file: Path) -> None:
    """Let the mask and every Attention over a cache end at the length of context_slots.

    The TensorScatter outputs stay graph outputs themselves: TensorRT takes nothing in between.
    """
    scattered = {output for node in graph.node if node.op_type == "TensorScatter" for output in node.output}
    length, start, axis = f"{CONTEXT_SLOTS}/length", f"{CONTEXT_SLOTS}/start", f"{CONTEXT_SLOTS}/axis"
    for name, value in ((start, 0), (axis, _COLUMN_AXIS)):
        graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value]))
    nodes = [helper.make_node("Shape", [CONTEXT_SLOTS], [length], name=length)]
    lengths = slices = 0
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in caches:
            node.input[0] = CONTEXT_SLOTS
            del node.attribute[:]
            lengths += 1
        if node.op_type == "Attention":
            for position, word in ((1, "keys"), (2, "values")):
                if node.input[position] in scattered:
                    used = f"{node.name}/used_{word}"
                    operands = [node.input[position], start, length, axis]
                    nodes.append(helper.make_node("Slice", operands, [used], name=used))
                    node.input[position] = used
                    slices += 1
        nodes.append(node)
    if not lengths or slices != len(caches):
        raise BundleError(
            f"{file}: {len(caches)} caches, of which {slices} are read by Attention and {lengths} give the mask its "
            "length: not a graph of this version. Export again: make export"
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _external_bytes(tensor: onnx.TensorProto) -> int:
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
