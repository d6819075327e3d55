"""Files written whole or not at all: a temporary file beside, then a rename."""

from pathlib import Path
from tempfile import NamedTemporaryFile

from hawk_trt.errors import InvalidInput


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, making its folder; what was there stays until the new one is whole.

    Raises:
        InvalidInput: the path cannot be written.
    """
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
