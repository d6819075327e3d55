"""What a phase writes down as it goes, so that a cut leaves all that was found before, and what a phase is told."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.phases import SHAPES, SIDE
from hawk_trt.errors import HawkError
from hawk_trt.files.staging import write_atomically

ROOT = Path(__file__).parent.parent.parent
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Skipped(Exception):
    """A phase has nothing to do on this machine, and why."""


class Failed(Exception):
    """A phase found something wrong; what it found is in its record."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a phase is told."""

    work: Path  # folder for what a phase makes and a later one uses
    seconds: float  # that the phase may take
    # None on a GPU. "stubs": the CUDA provider over stub libraries, and all else on the CPU; "cpu": everything on
    # the CPU, and small.
    rehearse: str | None
    shape: str = SHAPES[0]
    side: int = SIDE

    @property
    def small(self) -> bool:
        """Whether to take the tiny model and the shortest prompts."""
        return self.rehearse == "cpu"

    @property
    def torch_device(self) -> str:
        """Where PyTorch computes."""
        return "cpu" if self.rehearse else "cuda"


class Record:
    """The results of a phase: a JSON file that is whole after every call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = {}

    def put(self, **values: object) -> None:
        """Write values down by name."""
        self.results |= values
        self._write()

    def row(self, table: str, **values: object) -> None:
        """Write a row of a table down."""
        self.results.setdefault(table, []).append(values)
        self._write()

    @contextmanager
    def row_or_reason(self, table: str, **names: object) -> Iterator[dict[str, Any]]:
        """A row whose values the block fills in; where the block fails, the row says why and the next one follows."""
        values: dict[str, Any] = {}
        try:
            yield values
        except (HawkError, RuntimeError, OSError, ValueError, IndexError) as error:
            text = f"{type(error).__name__}: {error}"
            values["failed"] = " ".join(text.split())[:600]
        self.row(table, **(names | values))

    def raise_failures(self, table: str) -> None:
        """Fail the phase where a row of a table failed."""
        reasons = [row["failed"] for row in self.results.get(table, []) if row.get("failed")]
        if reasons:
            raise Failed(f"{len(reasons)} of {len(self.results[table])} {table}: {reasons[0]}")

    def _write(self) -> None:
        write_json(self._path, self.results)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
