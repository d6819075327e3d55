"""What is written whole or not at all: a file, or the folder of a bundle or of engines.

A folder is made beside its destination as .NAME.partial-PID, then swapped in. Leaving the context without an error puts
it in the destination's place and removes what was there, any error removes it. Killed at any moment, the destination is
the old folder or the new one; what a killed process left is removed by the next.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from hawk_trt.errors import BundleError, InvalidInput

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, making its folder; what was there stays until the new one is whole. InvalidInput where it fails."""
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, whose place no file may take
            path.write_bytes(content)
            return
        target = Path(os.path.realpath(path))  # where it is a link, what it leads to
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)  # a temporary file is made private
        temporary.replace(target)
        temporary = None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written there ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside out, to be filled, which takes its place at the end.

    out is absolute and resolved, so that a symbolic link keeps pointing at it. Raises BundleError: a file could not be
    written, or the folder not be moved; out is as it was.
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
