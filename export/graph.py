"""GraphBuilder: a thin layer over onnx-ir that names every node and declares inputs and outputs by the contract.

Weights enter as external tensors that a WeightStore has placed; nothing is read while a graph is built.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hawk_trt.bundle import numpy_dtype
from hawk_trt.stages import PORTABLE

from .contract import StageSpec, TensorSpec, residual_dtype
from .quantisation import QUANTISED_OPSET, ROW_SCALES_OPSET
from .weights import QuantisedMatrix, WeightStore

# TensorRT 10.3 parses the ops of opset 18; opset 24 has Attention, TensorScatter, RMSNormalization and RotaryEmbedding.
_PORTABLE_OPSET, _OPSET = 18, 24
# The oldest that carry those opsets.
_PORTABLE_IR_VERSION, _IR_VERSION = 10, 12
HAWK_DOMAIN = "hawk"

_IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "bool": ir.DataType.BOOL,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


def opset(target: str) -> int:
    """The opset of a target's graphs, before quantised weights ask for a newer one."""
    return _PORTABLE_OPSET if target == PORTABLE else _OPSET


class GraphBuilder:
    """Builds one graph for one target; its weights are placed in a file of its name.

    Attributes:
        dtype: of the model: "float32", "float16" or "bfloat16".
        residual: dtype of the residual stream.
        target: that runs it, one of hawk_trt.stages.TARGETS.
    """

    def __init__(self, name: str, dtype: str, target: str, weights: WeightStore) -> None:
        self.dtype = dtype
        self.residual = residual_dtype(dtype)
        self.target = target
        self.functions: list[ir.Function] = []
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset(target)})
        self._nodes = self._graph  # where nodes go: the graph, or a subgraph while that is built
        self._weights = weights
        self._weight_file = f"{name}.data"
        self._scopes: list[str] = []
        self._names: dict[str, int] = {}
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], ir.Value] = {}

    @property
    def opset24(self) -> bool:
        """Whether the target has Attention, RMSNormalization, RotaryEmbedding and Gelu as operators."""
        return self.target != PORTABLE

    @property
    def element_type(self) -> ir.DataType:
        """The model's dtype in ONNX."""
        return _IR_DTYPES[self.dtype]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def inputs(self, spec: StageSpec) -> dict[str, ir.Value]:
        """Declare all inputs of a stage; returns them by name."""
        values = {}
        for tensor in spec.inputs:
            value = ir.Value(name=tensor.name, type=self._type(tensor), shape=ir.Shape(tensor.shape))
            self._graph.inputs.append(value)
            values[tensor.name] = value
        return values

    def outputs(self, spec: StageSpec, values: dict[str, ir.Value]) -> None:
        """Declare all outputs of a stage from the values computed for them."""
        for tensor in spec.outputs:
            value = values[tensor.name]
            value.name = tensor.name
            value.type = self._type(tensor)
            value.shape = ir.Shape(tensor.shape)
            self._graph.outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:  # noqa: ANN401 - ONNX attributes are of many types
        """Add a node with one output."""
        return self.ops(op_type, *inputs, name=name, count=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        count: int,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 - ONNX attributes are of many types
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        if domain:
            self._graph.opset_imports[domain] = 1
        full = self._unique("/".join([*self._scopes, name]))
        suffixes = [""] if count == 1 else [f"/{i}" for i in range(count)]
        outputs = [ir.Value(name=f"{full}{suffix}") for suffix in suffixes]
        self._nodes.append(
            ir.node(op_type, list(inputs), attributes or None, domain=domain, outputs=outputs, name=full)
        )
        return outputs

    def subgraph(self, build: Callable[[ir.Value], Sequence[ir.Value]]) -> ir.Graph:
        """A body of one input, in the model's dtype, and the outputs that build returns; weights stay the graph's."""
        name = self._unique("/".join([*self._scopes, "tile"]))
        source = ir.Value(name=name, type=ir.TensorType(self.element_type))
        outer, self._nodes = self._nodes, ir.Graph([source], [], nodes=[], name=name)
        try:
            self._nodes.outputs.extend(build(source))
            return self._nodes
        finally:
            self._nodes = outer

    def weight(self, name: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        """A checkpoint tensor as initializer, once a graph."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = self._weights.initializer(self._weight_file, name, shape)
        self._graph.register_initializer(value)
        return value

    def quantised(self, name: str) -> QuantisedMatrix | None:
        """A quantised matrix, None where it is one of plain floats."""
        found = self._weights.quantised(self._weight_file, name, self.target)
        if found is None:
            return None
        parts = (found.values, found.scales, found.zero_points, found.shift, found.input_scale, found.order)
        for value in parts:
            if value is not None:
                self._graph.register_initializer(value)
        needed = ROW_SCALES_OPSET if found.by_row else QUANTISED_OPSET
        self._graph.opset_imports[""] = max(self._graph.opset_imports[""] or 0, needed)
        return found

    def has_weight(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return self._weights.has(name)

    def const(self, values: npt.ArrayLike, dtype: str) -> ir.Value:
        """A small constant as initializer, once a graph."""
        array = np.asarray(values, dtype=numpy_dtype(dtype))
        key = (array.tobytes(), dtype, array.shape)
        if key not in self._constants:
            flat = "_".join(f"{v:g}" for v in array.reshape(-1)[:4].astype(np.float64))
            more = "_etc" if array.size > 4 else ""
            name = self._unique(f"const/{dtype}_{flat}{more}")
            tensor = ir.Tensor(array, dtype=_IR_DTYPES[dtype], name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.const(values, "int64")

    def scalar(self, value: float) -> ir.Value:
        """A scalar constant in the model's dtype."""
        return self.const(value, self.dtype)

    def cast(self, x: ir.Value, source: str, target: str, name: str) -> ir.Value:
        """X in another dtype; x itself where both are the same."""
        return x if source == target else self.op("Cast", x, to=_IR_DTYPES[target], name=name)

    def reshape(self, x: ir.Value, *shape: int, name: str) -> ir.Value:
        """Reshape to constants (0 copies a dimension, -1 infers one)."""
        return self.op("Reshape", x, self.ints(*shape), name=name)

    def transpose(self, x: ir.Value, *perm: int, name: str) -> ir.Value:
        """Permute the dimensions."""
        return self.op("Transpose", x, perm=list(perm), name=name)

    def unsqueeze(self, x: ir.Value, *axes: int, name: str) -> ir.Value:
        """Insert dimensions of size 1."""
        return self.op("Unsqueeze", x, self.ints(*axes), name=name)

    def model(self) -> ir.Model:
        """The finished model."""
        for function in self.functions:
            function.opset_imports[""] = self._graph.opset_imports[""]
        version = _IR_VERSION if self.opset24 else _PORTABLE_IR_VERSION
        return ir.Model(self._graph, ir_version=version, producer_name="hawk_trt", functions=self.functions)

    def _type(self, tensor: TensorSpec) -> ir.TensorType:
        return ir.TensorType(_IR_DTYPES[tensor.dtype(self.dtype)])

    def _unique(self, name: str) -> str:
        seen = self._names.get(name, 0)
        self._names[name] = seen + 1
        return name if seen == 0 else f"{name}.{seen}"
