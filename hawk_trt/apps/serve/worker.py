"""Worker processes, for work on what strangers send: it may take long, or break the process, and can be ended.

main() is one: pickled functions come in, pickled results or errors go out. The server's side of it is in threads, since
100 MB of pixels that come over the event loop, as with anyio.to_process, would hold it for a third of a second.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class Workers:
    """Worker processes, each started when it is first needed and kept for more."""

    def __init__(self, most: int) -> None:
        self.limiter = anyio.CapacityLimiter(most)  # counts those at work
        self._idle: list[subprocess.Popen[bytes]] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in a process; BrokenWorkerProcess where that ended first. A caller that is cancelled ends it."""
        async with self.limiter:
            while self._idle and self._idle[-1].poll() is not None:  # the system ended it
                _end(self._idle.pop())
            worker = self._idle.pop() if self._idle else _start()
            try:
                result = await anyio.to_thread.run_sync(_ask, worker, work, abandon_on_cancel=True)
            except BaseException:  # a cancellation too
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(_end, worker)
                raise
            self._idle.append(worker)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End those that wait for work."""
        while self._idle:
            _end(self._idle.pop())


def _start() -> "subprocess.Popen[bytes]":
    # the same modules as here, wherever this process was started
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(worker: "subprocess.Popen[bytes]", work: Callable[[], T]) -> T | Exception:
    """Let a process do the work: its result, or its error. It ends early where _end is called meanwhile."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        pickle.dump(work, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        result: T | Exception = pickle.load(worker.stdout)
    except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise anyio.BrokenWorkerProcess from error
    return result


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    with suppress(OSError), worker:  # closes the pipes and waits
        pass


def main() -> None:
    """Do what comes in, until nothing more does."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print must not come between the results
    os.dup2(1, 2)
    for name in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server decides when to end
        signal.signal(name, signal.SIG_IGN)
    while True:
        try:
            work = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = work()
        except Exception as error:
            result = error
        pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
        results.flush()
