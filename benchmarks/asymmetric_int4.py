"""What zero points cost where a runtime takes none: the second product in TensorRT's graphs, at a released width.

In: a shape, of which one decoder layer gets random int4 weights with zero points, as AWQ and GPTQ have them. Out: for
each group size the multiply-adds of a token in that layer, counted in its graph, the share that the second product
takes of them, and how far both forms of the graph are from float64: the symmetric product and the second one (target
tensorrt), and the integers with their zero points (target cpu), by ONNX Runtime in float16 without any fusion.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.random_model import cut_config
from export.checkpoint import Checkpoint
from export.random_checkpoint import random_checkpoint
from export.real_shapes import SHAPES
from export.stored import IntegerMatrix
from export.writer import ExportOptions, export
from hawk_trt.bundle import Bundle, numpy_dtype
from hawk_trt.stages import CPU, DECODER, TENSORRT

_LAYER = "layers.1/"  # the first of the decoder graph
_WEIGHTS = "language_model.layers.1."
_TOKENS = 16
_DTYPE = "float16"
_INTEGERS = "/integers"


class RandomIntegers(IntegerMatrix):
    """int4 with zero points of no file, whose dequantised values have the size of a trained matrix's."""

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng([what, *self.name.encode()])

    def packed(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Two integers a byte: uint8 [rows * columns / 2]."""
        rows, columns = self.shape
        yield self._random(0).integers(0, 256, rows * columns // 2, dtype=np.uint8)

    def scales(self) -> npt.NDArray[Any]:
        """float16 [groups, rows]."""
        rows, columns = self.shape
        sizes = self._random(1).uniform(0.5, 1.5, (columns // self.format.block_size, rows))
        return (sizes / 8 / np.sqrt(columns)).astype(np.float16)

    def zero_points(self) -> npt.NDArray[np.uint8]:
        """Two a byte: uint8 [groups, rows / 2]."""
        rows, columns = self.shape
        return self._random(2).integers(0, 256, (columns // self.format.block_size, rows // 2), dtype=np.uint8)


def main() -> None:
    """Count, compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [shape for shape in SHAPES if not shape.startswith("qwen3.5")]  # two layers make no hybrid
    parser.add_argument("--shape", choices=shapes, default="qwen2.5-vl-7b")
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 64, 32])
    args = parser.parse_args()
    print(
        "| groups of | multiply-adds a token, millions | of the second product | its share | error | with zero points |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for group in args.groups:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = asymmetric_checkpoint(Path(scratch), args.shape, group)
            options = ExportOptions(_DTYPE, (CPU, TENSORRT), im_end_token_id=1, vision_end_token_id=2)
            bundle = export(checkpoint, Path(scratch) / "bundle", options, name=args.shape)
            whole, second = multiply_adds(bundle)
            errors = {target: largest_error(bundle, checkpoint, target) for target in (TENSORRT, CPU)}
        print(
            f"| {group} | {whole / 1e6:.1f} | {second / 1e6:.2f} | {second / whole:.2%} | "
            f"{errors[TENSORRT]:.1e} | {errors[CPU]:.1e} |",
            flush=True,
        )


def asymmetric_checkpoint(folder: Path, shape: str, group: int) -> Checkpoint:
    """Random weights of a shape's width, two layers deep, the matrices of the second with zero points."""
    checkpoint = random_checkpoint(folder, cut_config(shape, 2, 1))
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(_WEIGHTS) and name.endswith("_proj.weight"):
            size = (0, tensor.nbytes, "float32", tensor.shape)
            tensors[name] = RandomIntegers(name, tensor.file, *size, {}, 4, group, None)
    return replace(checkpoint, tensors=tensors)


def multiply_adds(bundle: Bundle) -> tuple[int, int]:
    """Of a token in the layer's products with weights, by the graph of the target tensorrt; and of the second ones."""
    graph = _graph(bundle, TENSORRT)
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sizes |= {node.output[0]: sizes[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"}
    counts = {
        node.name: int(np.prod(sizes[node.input[1]]))
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.name.startswith(_LAYER) and node.input[1] in sizes
    }
    return sum(counts.values()), sum(count for name, count in counts.items() if name.endswith("/shift"))


def largest_error(bundle: Bundle, checkpoint: Checkpoint, target: str) -> float:
    """The largest difference from float64 of any matrix's product, as a share of the product's largest value."""
    graph, worst = _graph(bundle, target), 0.0
    matrices = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for name, node in matrices.items():
        matrix = checkpoint.tensor(name.removesuffix(_INTEGERS))
        rows, columns = matrix.shape
        x = np.random.default_rng(columns).standard_normal((_TOKENS, columns)).astype(numpy_dtype(_DTYPE))
        weights = np.concatenate([block.reshape(-1, columns) for block in matrix.blocks()])
        exact = x.astype(np.float64) @ weights.astype(np.float64).T
        got = _product(bundle, graph, node, x, rows)
        worst = max(worst, float(np.abs(got - exact).max() / np.abs(exact).max()))
    return worst


def _product(
    bundle: Bundle, graph: onnx.GraphProto, dequantise: onnx.NodeProto, x: npt.NDArray[Any], rows: int
) -> npt.NDArray[np.float64]:
    """What a graph's nodes for one matrix make of x, by ONNX Runtime: the nodes as they are, bias left out."""
    stem = dequantise.name.removesuffix("/dequantised")
    wanted = (f"{stem}/dequantised", stem, f"{stem}/blocks", f"{stem}/block_means", f"{stem}/shift", f"{stem}/shifted")
    nodes = [node for node in graph.node if node.name in wanted]
    product = next(node for node in nodes if node.name == stem)
    held = {tensor.name for tensor in graph.initializer}
    used = {name for node in nodes for name in node.input if name in held}
    half = TensorProto.FLOAT16
    part = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info(product.input[0], half, x.shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], half, [len(x), rows])],
        [tensor for tensor in graph.initializer if tensor.name in used],
    )
    path = bundle.folder / "product.onnx"
    onnx.save(helper.make_model(part, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {product.input[0]: x})
    return np.asarray(got, np.float64)


def _graph(bundle: Bundle, target: str) -> onnx.GraphProto:
    file = bundle.folder / bundle.manifest.graph(DECODER, target).file
    return onnx.load(file, load_external_data=False).graph


if __name__ == "__main__":
    main()
