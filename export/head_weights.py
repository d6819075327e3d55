"""The default head weights of a bundle: from a file, the released ones where they fit, else uniform.

A file is JSON, either a list of numbers, one a query head of layer 0, or an object with that list as "values" and,
as "source", where they came from.
"""

import json
from importlib import resources
from pathlib import Path

from hawk_trt.bundle import HeadWeights
from hawk_trt.config import check_head_weights
from hawk_trt.errors import InvalidInput
from hawk_trt.stages import LanguageConfig

# By family, hidden_size, layers, heads and vocab_size: the released vector belongs to one model alone.
_RELEASED = {("qwen2_5_vl", 3584, 28, 28, 152064): "qwen2.5-vl-7b.json"}


def default_head_weights(family: str, language: LanguageConfig) -> HeadWeights:
    """The released weights of a model that has some, else 1 / heads for every head, said to be uncalibrated."""
    heads = language.num_attention_heads
    shape = (family, language.hidden_size, language.num_hidden_layers, heads, language.vocab_size)
    if shape not in _RELEASED:
        return HeadWeights((1.0 / heads,) * heads, "uniform (not calibrated)")
    file = resources.files("hawk_trt") / "data" / "head_weights" / _RELEASED[shape]
    return _parse(file.name, file.read_text(encoding="utf-8"))


def read_head_weights(path: Path) -> HeadWeights:
    """Head weights from a JSON file; how many there must be is known later.

    Raises:
        InvalidInput: it cannot be read, or does not hold finite numbers of at least 0.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"head weights: {path} cannot be read ({error})") from error
    return _parse(str(path), content)


def _parse(name: str, content: str) -> HeadWeights:
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"head weights: {name} is not JSON ({error})") from error
    values, source = (parsed.get("values"), parsed.get("source")) if isinstance(parsed, dict) else (parsed, None)
    if not isinstance(values, list):
        raise InvalidInput(f'head weights: {name}: got no list of numbers, expected [0.1, ...] or {{"values": [...]}}')
    return HeadWeights(check_head_weights(values), str(source or Path(name).name))
