"""The nodes of an ONNX function, every name under the function's: TensorRT 10.3 mixes up inner and outer ones."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class FunctionBody:
    """Collects the nodes of one function, or of a subgraph inside it.

    Attributes:
        nodes: in the order in which they were added.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._constants = 0

    def op(self, op_type: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:  # noqa: ANN401 - ONNX attributes are of many types
        """Add a node with one output."""
        return self.ops(op_type, *inputs, name=name, count=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: ir.Value, name: str, count: int, **attributes: Any) -> list[ir.Value]:  # noqa: ANN401 - ONNX attributes are of many types
        """Add a node with several outputs."""
        full = f"{self._prefix}/{name}"
        outputs = [ir.Value(name=full if count == 1 else f"{full}.{i}") for i in range(count)]
        self.nodes.append(ir.node(op_type, list(inputs), attributes or None, outputs=outputs, name=full))
        return outputs

    def const(self, value: npt.ArrayLike, dtype: type[np.generic]) -> ir.Value:
        """A Constant node: functions have no initializers."""
        self._constants += 1
        name = f"const_{self._constants}"
        return self.ops("Constant", name=name, count=1, value=ir.tensor(np.asarray(value, dtype)))[0]
