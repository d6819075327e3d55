"""A graph while it is built, and as ONNX writes it: values, and the nodes between them.

We make the protobuf messages ourselves, since onnx_ir, which could, takes longer to import than all graphs to build.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx.helper import make_attribute, make_tensor_value_info

# By the names of dtypes that bundles use.
ONNX_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int4": onnx.TensorProto.INT4,
    "int8": onnx.TensorProto.INT8,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of a graph."""

    name: str  # unique in the graph
    dtype: str | None = None  # None where it is not declared
    # integers, or the words of dynamic dimensions; None where it is not declared
    shape: tuple[int | str, ...] | None = None
    data: onnx.TensorProto | None = None  # of an initializer

    def info(self) -> onnx.ValueInfoProto:
        """The declaration; of a name alone where the dtype is not known."""
        if self.dtype is None:
            return onnx.ValueInfoProto(name=self.name)
        return make_tensor_value_info(self.name, ONNX_DTYPES[self.dtype], self.shape)


@dataclass(frozen=True, slots=True)
class Node:
    """An operator with its inputs, None where one is left out; an attribute may be a Graph."""

    op_type: str
    name: str
    domain: str
    inputs: Sequence[Value | None]
    outputs: Sequence[Value]
    attributes: dict[str, Any]

    def message(self) -> onnx.NodeProto:
        """As ONNX writes it."""
        attributes = {key: got.message() if isinstance(got, Graph) else got for key, got in self.attributes.items()}
        return onnx.NodeProto(
            op_type=self.op_type,
            name=self.name,
            domain=self.domain or None,
            input=["" if value is None else value.name for value in self.inputs],
            output=[value.name for value in self.outputs],
            attribute=[make_attribute(key, got) for key, got in attributes.items()],
        )


@dataclass(slots=True)
class Graph:
    """A graph, or the body of a loop; its initializers by their names."""

    name: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Value] = field(default_factory=dict)

    def message(self) -> onnx.GraphProto:
        """As ONNX writes it."""
        results = {id(value) for value in self.outputs}
        inner = [value for node in self.nodes for value in node.outputs if value.dtype and id(value) not in results]
        return onnx.GraphProto(
            name=self.name,
            input=[value.info() for value in self.inputs],
            output=[value.info() for value in self.outputs],
            node=[node.message() for node in self.nodes],
            initializer=[value.data for value in self.initializers.values() if value.data is not None],
            value_info=[value.info() for value in (*self.initializers.values(), *inner)],
        )
