"""The head weights of a bundle that was given none: the released ones where they fit, else uniform ones."""

from importlib import resources

from hawk_trt.bundle import HeadWeights
from hawk_trt.pruning.head_weights import parse_head_weights
from hawk_trt.stages import LanguageConfig

UNIFORM = "uniform (not calibrated)"
# By family, hidden_size, layers, heads and vocab_size: the released vector belongs to one model alone.
_RELEASED = {("qwen2_5_vl", 3584, 28, 28, 152064): "qwen2.5-vl-7b.json"}


def default_head_weights(family: str, language: LanguageConfig) -> HeadWeights:
    """The released weights of a model that has some, else 1 / heads for every head, said to be uncalibrated."""
    heads = language.num_attention_heads
    shape = (family, language.hidden_size, language.num_hidden_layers, heads, language.vocab_size)
    if shape not in _RELEASED:
        return HeadWeights((1.0 / heads,) * heads, UNIFORM)
    file = resources.files("hawk_trt") / "data" / "head_weights" / _RELEASED[shape]
    return parse_head_weights(file.name, file.read_text(encoding="utf-8"))
