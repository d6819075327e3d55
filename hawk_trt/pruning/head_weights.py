"""Head weights in a file: what `hawk-trt calibrate` writes, and what the export, the commands and Python read.

A file is JSON: a list of numbers, one a query head of layer 0, or an object with that list as "values" and, as
"source", where they came from. More keys say more to people and are not read.
"""

from pathlib import Path

from hawk_trt.bundle import HeadWeights
from hawk_trt.errors import InvalidInput
from hawk_trt.files import parse_json, read_bytes
from hawk_trt.request import check_head_weights


def read_head_weights(path: Path) -> HeadWeights:
    """Head weights from a file, for `PruningConfig(head_weights=read_head_weights(path).values)`.

    Raises InvalidInput: it cannot be read, or does not hold finite numbers of at least 0.
    """
    return parse_head_weights(str(path), read_bytes(path, InvalidInput))


def parse_head_weights(name: str, content: str | bytes) -> HeadWeights:
    """The same from a file's content; its name is for errors, and the source where the content has none."""
    parsed = parse_json(content, object, f"head weights: {name}", InvalidInput)
    values, source = (parsed.get("values"), parsed.get("source")) if isinstance(parsed, dict) else (parsed, None)
    if not isinstance(values, list):
        raise InvalidInput(f'head weights: {name}: got no list of numbers, expected [0.1, ...] or {{"values": [...]}}')
    return HeadWeights(check_head_weights(values), str(source or Path(name).name))
