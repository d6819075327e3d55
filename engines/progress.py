"""How far a build is, on stderr: bars on a terminal, one plain line now and then elsewhere.

TensorRT reports nested phases, each with its number of steps. Its own adapter is in builder.py.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# Between two lines where no bar can be drawn.
_PLAIN_SECONDS = 20.0


class BuildProgress:
    """The phases of all builds of a run. Use it as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}
        self._stage = ""
        self._printed_at = time.monotonic()

    def __enter__(self) -> "BuildProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything reported inside belongs to one stage."""
        self._stage = name
        print(f"building {name}", file=sys.stderr, flush=True)
        yield
        for phase in list(self._depth):
            self.finish(phase)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, maybe inside another."""
        depth = self._depth[phase] = self._depth.get(parent or "", -1) + 1
        if self._bars is not None:
            description = f"{self._stage}: {phase}" if depth == 0 else f"{'  ' * depth}{phase}"
            self._tasks[phase] = self._bars.add_task(description, total=steps)

    def step(self, phase: str, step: int) -> None:
        """A step of a phase is done."""
        if self._bars is not None:
            if phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=step + 1)
        elif time.monotonic() - self._printed_at > _PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            print(f"building {self._stage}: {phase}, step {step + 1}", file=sys.stderr, flush=True)

    def finish(self, phase: str) -> None:
        """A phase is over."""
        self._depth.pop(phase, None)
        if self._bars is not None and phase in self._tasks:
            self._bars.remove_task(self._tasks.pop(phase))
