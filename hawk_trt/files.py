"""Files and folders: JSON from outside read within bounds, hashes, and outputs written whole or not at all.

read_json         a file's JSON, checked for size, depth and types
write_atomically  a file: a temporary one beside it, then a rename
staged            a folder: made beside its destination as .NAME.partial-PID, then swapped in. Leaving the context
                  without an error puts it in the destination's place and removes what was there, any error removes
                  it. Killed at any moment, the destination is the old folder or the new one; what a killed process
                  left is removed by the next.
"""

import codecs
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

import msgspec

from hawk_trt.errors import BundleError, HawkError, InvalidInput

# The largest JSON of a checkpoint is its tokenizer: 35 MB for a vocabulary of 262,144.
LFS_POINTER = b"version https://git-lfs"
LFS_ADVICE = "only a pointer of Git LFS is there, not the file. Get it, in the folder of the checkpoint: git lfs pull"
MAX_JSON_BYTES = 256 << 20
MAX_JSON_DEPTH = 64
_HASH_BLOCK_BYTES = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_T = TypeVar("_T")


def read_json(path: Path, kind: type[_T], error: type[HawkError], advice: str = "") -> _T:
    """The JSON in a file that others may have written: see read_bytes and parse_json."""
    return parse_json(read_bytes(path, error, advice), kind, str(path), error, advice)


def read_bytes(path: Path, error: type[HawkError], advice: str = "") -> bytes:
    """A file of text that others may have written, without the byte order mark that some editors put in front.

    Raises:
        HawkError: of the type `error`: it cannot be read, or is larger than any such file.
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
    """JSON that others may have written.

    Args:
        content: of a file.
        kind: what it must hold, such as dict[str, Any] or a dataclass.
        name: of the file, for the error.
        error: raised where it holds something else.
        advice: what the reader of the error can do.

    Raises:
        HawkError: of the type `error`: too large, nested too deeply, not JSON, or JSON of another kind.
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


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hex; progress is called with the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def cache_folder() -> Path:
    """This user's folder of things that can be made again: ~/.cache/hawk_trt, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hawk_trt"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, making its folder; what was there stays until the new one is whole. InvalidInput where it fails."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)  # a temporary file is made private
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written there ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside out, to be filled, which takes its place at the end.

    out is absolute and resolved, so that a symbolic link keeps pointing at it.

    Raises:
        BundleError: a file could not be written, or the folder not be moved; out is as it was.
    """
    partial = _beside(out, "partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _put_in_place(partial, out)
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise BundleError(
            f"{out}: writing failed ({error.strerror or error}{where}); nothing there was changed. "
            "Free space or choose another folder with --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(out: Path, is_ours: Callable[[str], bool], maker: str) -> None:
    """Refuse, as a BundleError, to replace a file, or a folder that holds what was made by something else.

    is_ours says whether a file of a name may go.  maker: what makes such folders, for the error.
    """
    if out.exists() and not out.is_dir():
        raise BundleError(f"{out}: a file, expected a folder or nothing. Choose another with --out")
    foreign = sorted(path.name for path in out.iterdir() if not is_ours(path.name)) if out.exists() else []
    if foreign:
        raise BundleError(
            f"{out}: holds {', '.join(foreign[:3])}, which no {maker} wrote and which would be lost. "
            "Choose an empty folder with --out, or move it away"
        )


def check_free_space(out: Path, needed_bytes: int, what: str, advice: str) -> None:
    """Refuse to begin what the disk cannot hold; the older folder stays until the new one is whole."""
    parent = next(path for path in out.parents if path.exists())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"{parent}: {free_bytes / 1e9:.2f} GB free, {what} about {needed_bytes / 1e9:.2f} GB. {advice}"
        )


def clean_up_after_killed(out: Path) -> None:
    """Remove what exports to out left behind when they were killed, and put back a folder they had moved aside."""
    prefix = f".{out.name}."
    siblings = list(out.parent.iterdir()) if out.parent.is_dir() else []
    for path in siblings:
        kind, _, pid = path.name.removeprefix(prefix).partition("-")
        ours = path.name.startswith(prefix) and kind in ("partial", "previous") and pid.isdecimal()
        if not ours or _is_alive(int(pid)):
            continue
        if kind == "previous" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def _is_alive(pid: int) -> bool:
    """Whether another process of this number runs; ours has just begun, so what bears its number is left over."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename partial to out; what was there is then at partial, or gone."""
    if not out.exists() or not any(out.iterdir()):
        partial.rename(out)
    elif not _exchange(partial, out):
        previous = _beside(out, "previous")
        out.rename(previous)
        try:
            partial.rename(out)
        except OSError:
            previous.rename(out)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system (Linux only) or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
