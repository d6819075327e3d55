"""The activations of the vision towers, in the ops of any target."""

import math

from ..graph import GraphBuilder, Value


def gelu(g: GraphBuilder, x: Value) -> Value:
    """X * Phi(x), by the error function; Gelu exists from opset 20 on."""
    if g.opset24:
        return g.op("Gelu", x, name="gelu")
    with g.scope("gelu"):
        erf = g.op("Erf", g.op("Mul", x, g.scalar(0.5**0.5), name="over_root_2"), name="erf")
        twice_phi = g.op("Add", erf, g.scalar(1.0), name="twice_phi")
        return g.op("Mul", g.op("Mul", x, g.scalar(0.5), name="half"), twice_phi, name="gelu")


def gelu_tanh(g: GraphBuilder, x: Value) -> Value:
    """X / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    if g.opset24:
        return g.op("Gelu", x, approximate="tanh", name="gelu")
    with g.scope("gelu"):
        square = g.op("Mul", x, x, name="square")
        factor = g.op("Add", g.op("Mul", square, g.scalar(0.044715), name="share"), g.scalar(1.0), name="factor")
        inner = g.op("Mul", g.op("Mul", x, factor, name="cubic"), g.scalar(math.sqrt(2 / math.pi)), name="inner")
        twice_phi = g.op("Add", g.op("Tanh", inner, name="tanh"), g.scalar(1.0), name="twice_phi")
        return g.op("Mul", g.op("Mul", x, g.scalar(0.5), name="half"), twice_phi, name="gelu")


def quick_gelu(g: GraphBuilder, x: Value) -> Value:
    """X * sigmoid(1.702 x)."""
    with g.scope("quick_gelu"):
        gate = g.op("Sigmoid", g.op("Mul", x, g.scalar(1.702), name="scaled"), name="sigmoid")
        return g.op("Mul", x, gate, name="quick_gelu")
