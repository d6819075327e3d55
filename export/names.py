"""From the names that a checkpoint's tensors have to the one name that graphs know them by.

visual.*, language_model.* and lm_head.weight are canonical. A function here or beside a family's vision graph gives a
tensor's canonical names: mostly one, several where a fused tensor holds equal parts, one below the other.
"""

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
