"""What a model's tensors are called, and the tables of their shapes.

visual.*, language_model.* and lm_head.weight are the canonical names, by which graphs know them. A function here or
beside a family's vision graph gives a tensor's canonical names: mostly one, several where a fused tensor holds equal
parts, one below the other.
"""

Shapes = dict[str, tuple[int, ...]]

EMBEDDINGS = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# The first that fits decides; what fits none keeps its name.
_QWEN_PREFIXES = (
    ("model.language_model.", "language_model."),
    ("model.visual.", "visual."),
    ("model.", "language_model."),
)


def qwen_names(name: str) -> tuple[str, ...]:
    """Of the Qwen families: the hub's names (visual.*, model.*) and those of newer saves (model.visual.*, ..)."""
    for prefix, canonical in _QWEN_PREFIXES:
        if name.startswith(prefix):
            return (canonical + name.removeprefix(prefix),)
    return (name,)


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    """A linear layer: weight [rows, columns] and, with bias, bias [rows]."""
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def layer_norm(name: str, size: int) -> Shapes:
    """A layer norm: weight and bias [size]."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
