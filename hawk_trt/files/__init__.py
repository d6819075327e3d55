"""Files: JSON from outside read within bounds, and hashes. What is written, whole or not at all: staging.py."""

import codecs
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from xxhash import xxh3_128

from hawk_trt.errors import HawkError

# The largest JSON of a checkpoint is its tokenizer: 35 MB for a vocabulary of 262,144.
LFS_POINTER = b"version https://git-lfs"
LFS_ADVICE = "only a pointer of Git LFS is there, not the file. Get it, in the folder of the checkpoint: git lfs pull"
MAX_JSON_BYTES = 256 << 20
MAX_JSON_DEPTH = 64
_HASH_BLOCK_BYTES = 1 << 20
_T = TypeVar("_T")


def read_json(path: Path, kind: type[_T], error: type[HawkError], advice: str = "") -> _T:
    """The JSON in a file that others may have written: see read_bytes and parse_json."""
    return parse_json(read_bytes(path, error, advice), kind, str(path), error, advice)


def read_bytes(path: Path, error: type[HawkError], advice: str = "") -> bytes:
    """A file of text that others may have written, without the byte order mark that some editors put in front.

    Raises `error`: it cannot be read, or is larger than any such file.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_JSON_BYTES:
            raise error(f"{path}: got {size_bytes} bytes, expected at most {MAX_JSON_BYTES}. {advice}".rstrip(". "))
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem}). {advice}".rstrip(". ")) from problem
    if content.startswith(LFS_POINTER):
        raise error(f"{path}: {LFS_ADVICE}")
    return content.removeprefix(codecs.BOM_UTF8)


def parse_json(content: bytes | str, kind: type[_T], name: str, error: type[HawkError], advice: str = "") -> _T:
    """JSON that others may have written: a `kind`, such as dict[str, Any] or a dataclass, from a file of this name.

    Raises `error`, with advice to its reader: too large, nested too deeply, not JSON, or JSON of another kind.
    """
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{name}: got {len(content)} bytes, expected at most {MAX_JSON_BYTES}. {advice}".rstrip())
    try:
        value = msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise error(f"{name}: damaged ({problem}). {advice}".rstrip()) from problem
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
    if level:
        raise error(f"{name}: its JSON is nested deeper than {MAX_JSON_DEPTH} levels. {advice}".rstrip())
    return value


def xxh3_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The XXH3-128 of a file, in hex; progress is called with the bytes read."""
    digest = xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def cache_folder() -> Path:
    """This user's folder of things that can be made again: ~/.cache/hawk_trt, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hawk_trt"
