"""What commands print: JSON on stdout, notes on stderr."""

import sys
from typing import Any

import msgspec
import numpy as np


def print_json(*parts: object) -> None:
    """Print dataclasses and mappings, joined, as one JSON object on stdout; arrays become lists."""
    fields: dict[str, Any] = {}
    for part in parts:
        fields |= msgspec.to_builtins(part, enc_hook=_plain)
    print(msgspec.json.format(msgspec.json.encode(fields), indent=1).decode())


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


def size(size_bytes: int) -> str:
    """A number of bytes for people: "6.3 MB"."""
    value, unit = float(size_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
