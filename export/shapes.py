"""Names and shapes of tensors, as the tables of what a model must have are made of."""

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    """A linear layer: weight [rows, columns] and, with bias, bias [rows]."""
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def layer_norm(name: str, size: int) -> Shapes:
    """A layer norm: weight and bias [size]."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
