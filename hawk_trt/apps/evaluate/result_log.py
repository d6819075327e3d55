"""A JSONL file of results that a killed run goes on with.

Its first line says what the results are of; a run of something else is refused. Each result is one line, written in
one piece as soon as it is known. A line that a kill cut short is dropped when the file is opened again, and one that
the disk did not take is cut off again at once. One process at a time holds the file; the lock of a killed one is gone
with it.
"""

import errno
import fcntl
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from hawk_trt.errors import InvalidInput
from hawk_trt.files import parse_json

Record = TypeVar("Record")


class ResultLog(Generic[Record]):
    """The results known so far, in memory (records) and on disk (path)."""

    def __init__(
        self,
        path: Path,
        subject: Mapping[str, str],
        record_type: type[Record],
        *,
        option: str = "--out",
        sync: bool = False,
    ) -> None:
        """Open a log, or begin one; its folder is made where there is none.

        subject: what the results are of: model, data set, settings; another's file is refused. record_type: dataclass
        of one result. option: of the command line that chooses the file's folder, for messages. sync: wait for the disk
        itself after each result, so that it also outlives the machine's own death.
        """
        self.path = path
        self._sync = sync
        self.records: list[Record] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as otherwise:  # whoever cannot have the log does not hold its lock either
                self._file = otherwise.enter_context(path.open("a+b", buffering=0))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._begin(subject, record_type, option)
                otherwise.pop_all()
        except BlockingIOError as error:
            raise InvalidInput(
                f"{path}: another run is writing there. Wait for it, or choose another {option}"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, record: Record) -> None:
        """Keep a result, on disk before this returns; where that fails, the file holds those before it, whole."""
        try:
            self._write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            raise self._unwritable(error) from error
        self.records.append(record)

    def close(self) -> None:
        """Close the file. A network's file system may say only now that the disk did not take what was written."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, line: bytes) -> None:
        """Write a whole line, or nothing; without a buffer of Python's, so that it stays when the process is killed."""
        file = self._file.fileno()
        before = os.fstat(file).st_size
        left = memoryview(line)
        try:
            while left:  # a disk that is almost full takes a part
                written = os.write(file, left)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                left = left[written:]
            if self._sync:
                os.fsync(file)
        except BaseException:
            with suppress(OSError):  # the next run cuts off what this cannot
                os.ftruncate(file, before)
            raise

    def _unwritable(self, error: OSError) -> InvalidInput:
        reason = error.strerror or error
        return InvalidInput(
            f"{self.path}: cannot be written ({reason}). Results before this are kept: free space or mend the folder, "
            "then go on with the same command"
        )

    def _begin(self, subject: Mapping[str, str], record_type: type[Record], option: str) -> None:
        """Read what there is, drop a line that was cut short, and write the first one to an empty file."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        advice = f"Choose another {option}, or delete it"
        if lines:
            held = parse_json(lines[0], dict[str, str], f"{self.path}: not a file of results", InvalidInput, advice)
            for name in sorted({*held, *subject}):
                if held.get(name) != subject.get(name):
                    raise InvalidInput(
                        f"{self.path}: it holds results of another {name} ({held.get(name)}, not {subject.get(name)}). "
                        f"{advice}"
                    )
            self.records = [
                parse_json(line, record_type, f"{self.path}, line {number}", InvalidInput, advice)
                for number, line in enumerate(lines[1:], 2)
            ]
        self._file.truncate(len(whole))
        if not lines:
            self._write(msgspec.json.encode(dict(sorted(subject.items()))) + b"\n")
