"""Worker processes, for work on what strangers send: it may take long, or break the process, and can be ended.

main() is one: pickled functions come in, pickled results or errors go out.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class WorkerEndedError(Exception):
    """The process ended before its work was done: the system ended it, or it broke."""


class _Worker:
    """One process, which does one piece of work after another."""

    def __init__(self) -> None:
        # the same modules as here, wherever this process was started
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """Do the work: its result, or its error. It ends early where close is called meanwhile."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(work, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            result: tuple[Any, Exception | None] = pickle.load(self._process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise WorkerEndedError from error
        return result

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        with suppress(OSError), self._process:  # closes the pipes and waits
            pass


class Workers:
    """Worker processes, each started when it is first needed and kept for more."""

    def __init__(self, most: int) -> None:
        self.limiter = anyio.CapacityLimiter(most)  # counts those at work
        self._idle: list[_Worker] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in a process; WorkerEndedError where that ended first. A caller that is cancelled ends it."""
        async with self.limiter:
            worker = self._idle.pop() if self._idle else _Worker()
            try:
                value, error = await anyio.to_thread.run_sync(worker.run, work, abandon_on_cancel=True)
            except BaseException:  # a cancellation too
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(worker.close)
                raise
            self._idle.append(worker)
        if error is not None:
            raise error
        result: T = value
        return result

    def close(self) -> None:
        """End those that wait for work."""
        while self._idle:
            self._idle.pop().close()


def main() -> None:
    """Do what comes in, until nothing more does."""
    # what libraries print must not come between the results
    work_in, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for name in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server decides when to end
        signal.signal(name, signal.SIG_IGN)
    while True:
        value = error = None
        try:
            work = pickle.load(work_in)
            value = work()
        except EOFError:
            return
        except Exception as raised:
            error = raised
        pickle.dump((value, error), results, pickle.HIGHEST_PROTOCOL)
        results.flush()
