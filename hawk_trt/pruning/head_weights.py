"""Head weights in a file: what `hawk-trt calibrate` writes, and what the export, the commands and Python read.

A file is JSON: a list of numbers, one a query head of layer 0, or an object with that list as "values" and, as
"source", where they came from. More keys say more to people and are not read.
"""

import json
from pathlib import Path

from hawk_trt.bundle import HeadWeights
from hawk_trt.errors import InvalidInput
from hawk_trt.request import check_head_weights


def read_head_weights(path: Path) -> HeadWeights:
    """Head weights from a file; how many there must be is known later.

    `PruningConfig(head_weights=read_head_weights(path).values)` prunes with them.

    Raises:
        InvalidInput: it cannot be read, or does not hold finite numbers of at least 0.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"head weights: {path} cannot be read ({reason})") from error
    return parse_head_weights(str(path), content)


def parse_head_weights(name: str, content: str) -> HeadWeights:
    """Head weights from the content of a file.

    Args:
        name: of the file, for messages and as source where the content has none.
        content: its JSON.

    Raises:
        InvalidInput: something else in it than finite numbers of at least 0.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise InvalidInput(f"head weights: {name} is not JSON ({error})") from error
    values, source = (parsed.get("values"), parsed.get("source")) if isinstance(parsed, dict) else (parsed, None)
    if not isinstance(values, list):
        raise InvalidInput(f'head weights: {name}: got no list of numbers, expected [0.1, ...] or {{"values": [...]}}')
    return HeadWeights(check_head_weights(values), str(source or Path(name).name))
