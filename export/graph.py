"""GraphBuilder: names every node, and declares inputs and outputs by the contract.

Weights enter as external tensors that a WeightStore has placed; nothing is read while a graph is built.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx.helper import make_attribute, make_tensor_value_info

from hawk_trt.bundle import GraphEntry, numpy_dtype
from hawk_trt.stages import CUDA, PORTABLE, VISION

from .contract import residual_dtype
from .quantisation import QUANTISED_OPSET, ROW_SCALES_OPSET
from .weights import ONNX_DTYPES, QuantisedMatrix, WeightStore

# A tensor of a graph: its name.
Value: TypeAlias = str

# TensorRT 10.3 parses the ops of opset 18; opset 24 has Attention, TensorScatter, RMSNormalization and RotaryEmbedding.
_PORTABLE_OPSET, _OPSET = 18, 24
# The oldest that carry those opsets.
_PORTABLE_IR_VERSION, _IR_VERSION = 10, 12
HAWK_DOMAIN = "hawk"
# ONNX Runtime's own operators.
ORT_DOMAIN = "com.microsoft"
# Behind the last index of any axis.
END = int(np.iinfo(np.int64).max)


def opset(target: str) -> int:
    """The opset of a target's graphs, before quantised weights ask for a newer one."""
    return _PORTABLE_OPSET if target == PORTABLE else _OPSET


class GraphBuilder:
    """Builds one graph for one target; its weights are placed in a file named by the stage.

    Attributes:
        entry: what the manifest says of the graph.
        dtype: of the model: "float32", "float16" or "bfloat16".
        residual: dtype of the residual stream.
        target: that runs it, one of hawk_trt.stages.TARGETS.
        inputs: of the stage, by name.
    """

    def __init__(self, entry: GraphEntry, dtype: str, weights: WeightStore) -> None:
        self.entry = entry
        self.dtype = dtype
        self.residual = residual_dtype(dtype)
        self.target = entry.target
        self.inputs: dict[str, Value] = {tensor.name: tensor.name for tensor in entry.inputs}
        self.functions: list[onnx.FunctionProto] = []
        self._opsets = {"": opset(self.target)}
        self._graph = onnx.GraphProto(
            name=entry.stage,
            input=[_info(tensor.name, tensor.dtype, tensor.shape) for tensor in entry.inputs],
            output=[_info(tensor.name, tensor.dtype, tensor.shape) for tensor in entry.outputs],
        )
        self._nodes = self._graph.node  # where nodes go: the graph's, or a subgraph's while that is built
        self._weights = weights
        self._weight_file = f"{entry.stage}.data"
        self._scopes: list[str] = []
        self._names: dict[str, int] = {}
        self._initializers: set[Value] = set()
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], Value] = {}
        self._declared: list[onnx.ValueInfoProto] = []

    @property
    def opset24(self) -> bool:
        """Whether the target has Attention, RMSNormalization, RotaryEmbedding and Gelu as operators."""
        return self.target != PORTABLE

    @property
    def bias_apart(self) -> bool:
        """Whether a linear layer's bias is added apart: in a Gemm, ONNX Runtime on CUDA writes it to all rows first."""
        return (self.target, self.entry.stage) == (CUDA, VISION)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def outputs(self, values: dict[str, Value]) -> None:
        """Give the values computed for the outputs of the stage their names."""
        names = {values[tensor.name]: tensor.name for tensor in self.entry.outputs}
        for node in self._graph.node:
            node.input[:] = [names.get(value, value) for value in node.input]
            node.output[:] = [names.get(value, value) for value in node.output]
        self._graph.value_info.extend(info for info in self._declared if info.name not in names)

    def declare(self, value: Value, dtype: str, *shape: int | str) -> None:
        """Say the type of a value that a runtime cannot infer."""
        self._declared.append(_info(value, dtype, shape))

    def op(self, op_type: str, *inputs: Value | None, name: str, domain: str = "", **attributes: Any) -> Value:  # noqa: ANN401 - ONNX attributes are of many types
        """Add a node with one output."""
        return self.ops(op_type, *inputs, name=name, count=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Value | None,
        name: str,
        count: int,
        domain: str = "",
        also: Sequence[Value] = (),
        **attributes: Any,  # noqa: ANN401 - ONNX attributes are of many types
    ) -> Sequence[Value]:
        """Add a node with several outputs; also: names of further ones, "" where one is left out."""
        if domain:
            self._opsets[domain] = 1
        full = self._unique("/".join([*self._scopes, name]))
        outputs = [full] if count == 1 else [f"{full}/{number}" for number in range(count)]
        node = onnx.NodeProto(
            op_type=op_type,
            name=full,
            domain=domain or None,
            input=[value or "" for value in inputs],  # None where one is left out
            output=[*outputs, *also],
            attribute=[make_attribute(key, value) for key, value in attributes.items()],
        )
        self._nodes.append(node)
        return outputs

    def take_sum(self, x: Value) -> Sequence[Value]:
        """The terms of x, whose node is taken back, where that is an Add and the last so far; else nothing."""
        if not self._nodes or self._nodes[-1].op_type != "Add" or self._nodes[-1].output[0] != x:
            return ()
        return list(self._nodes.pop().input)

    def subgraph(self, build: Callable[[Value], Sequence[Value]]) -> onnx.GraphProto:
        """A body of one input, in the model's dtype, and the outputs that build returns; weights stay the graph's."""
        name = self._unique("/".join([*self._scopes, "tile"]))
        body = onnx.GraphProto(name=name, input=[_info(name, self.dtype, None)])
        outer, self._nodes = self._nodes, body.node
        try:
            body.output.extend(onnx.ValueInfoProto(name=value) for value in build(name))
            return body
        finally:
            self._nodes = outer

    def weight(self, name: str, *shape: int, flat: bool = False) -> Value:
        """A checkpoint tensor as initializer, once a graph; flat makes one of all dimensions but the first."""
        if name in self._initializers:
            return name
        return self._initializer(self._weights.initializer(self._weight_file, name, shape, flat=flat))

    def expect(self, name: str, *shape: int) -> None:
        """Refuse a checkpoint without a tensor of this shape, as weight does, before it is used."""
        self._weights.checkpoint.tensor(name, shape)

    def quantised(self, name: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        """A quantised matrix, None where it is one of plain floats."""
        found = self._weights.quantised(self._weight_file, name, shape, self.target)
        if found is None:
            return None
        for part in (found.values, found.scales, found.zero_points, found.shift, found.input_scale, found.order):
            if part is not None:
                self._initializer(part)
        self._opsets[""] = max(self._opsets[""], ROW_SCALES_OPSET if found.by_row else QUANTISED_OPSET)
        return found

    def const(self, values: npt.ArrayLike, dtype: str) -> Value:
        """A small constant as initializer, once a graph."""
        array = np.asarray(values, dtype=numpy_dtype(dtype))
        key = (array.tobytes(), dtype, array.shape)
        if key not in self._constants:
            flat = "_".join(f"{v:g}" for v in array.reshape(-1)[:4].astype(np.float64))
            more = "_etc" if array.size > 4 else ""
            name = self._unique(f"const/{dtype}_{flat}{more}")
            data = onnx.TensorProto(name=name, data_type=ONNX_DTYPES[dtype], dims=array.shape, raw_data=key[0])
            self._constants[key] = self._initializer(data)
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        return self.const(values, "int64")

    def scalar(self, value: float) -> Value:
        """A scalar constant in the model's dtype."""
        return self.const(value, self.dtype)

    def cast(self, x: Value, source: str, target: str, name: str) -> Value:
        """X in another dtype; x itself where both are the same."""
        return x if source == target else self.op("Cast", x, to=ONNX_DTYPES[target], name=name)

    def reshape(self, x: Value, *shape: int, name: str) -> Value:
        """Reshape to constants (0 copies a dimension, -1 infers one)."""
        return self.op("Reshape", x, self.ints(*shape), name=name)

    def transpose(self, x: Value, *perm: int, name: str) -> Value:
        return self.op("Transpose", x, perm=list(perm), name=name)

    def unsqueeze(self, x: Value, *axes: int, name: str) -> Value:
        return self.op("Unsqueeze", x, self.ints(*axes), name=name)

    def cut(self, x: Value, axis: int, start: int, end: int, *, name: str) -> Value:
        """The part of an axis from start up to end; END takes all that follows."""
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis), name=name)

    def model(self) -> onnx.ModelProto:
        for function in self.functions:
            function.opset_import[0].version = self._opsets[""]
        return onnx.ModelProto(
            ir_version=_IR_VERSION if self.opset24 else _PORTABLE_IR_VERSION,
            producer_name="hawk_trt",
            opset_import=[
                onnx.OperatorSetIdProto(domain=name, version=number) for name, number in self._opsets.items()
            ],
            graph=self._graph,
            functions=self.functions,
        )

    def _initializer(self, data: onnx.TensorProto) -> Value:
        if data.name not in self._initializers:
            self._initializers.add(data.name)
            self._graph.initializer.append(data)
            self._graph.value_info.append(make_tensor_value_info(data.name, data.data_type, data.dims))
        return data.name

    def _unique(self, name: str) -> str:
        seen = self._names.get(name, 0)
        self._names[name] = seen + 1
        return name if seen == 0 else f"{name}.{seen}"


def _info(name: str, dtype: str, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return make_tensor_value_info(name, ONNX_DTYPES[dtype], shape)
