"""Batcher: the scheduler in a thread of its own, for many clients.

In: requests, from any thread. Out: events, in the batcher's thread: pieces of text, then the result or an error.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from hawk_trt.errors import BackendError, HawkError
from hawk_trt.pipeline import Pipeline
from hawk_trt.request import Request, Result, TokenLogprobs
from hawk_trt.scheduler import DEFAULT_MAX_BATCH, ROOM, Scheduler
from hawk_trt.sequence import Sequence

_MB = 1_000_000
_LOG = logging.getLogger(__name__)


class Stopping(HawkError):
    """The server ends: it takes no more requests, and gives up what it could not finish."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer's text, never empty, and the log probabilities of its tokens where asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


# The last is a result, whose text is all pieces together, or the reason why there is none: Stopping, InvalidInput (a
# selector's choice that cannot be used) or BackendError.
Event: TypeAlias = Piece | Result | HawkError


@dataclass(frozen=True, slots=True)
class Counters:
    """What a batcher has done since it began; the last three are requests that ended so."""

    prefills: int  # of a prompt, or of several together
    steps: int  # decode steps
    rows: int  # of all decode steps together
    finished: int
    failed: int
    cancelled: int


class Batcher:
    """Answers requests on one pipeline. Close it, or use it as a context manager.

    Nobody else may run answers on the pipeline meanwhile; prepare and layout may be called from any thread.
    """

    def __init__(
        self, pipe: Pipeline, *, max_batch: int = DEFAULT_MAX_BATCH, max_cache_mb: float | None = None
    ) -> None:
        """Start the thread. Bounds: rows of a step, megabytes of the KV caches of all rows."""
        self._scheduler = Scheduler(
            pipe.bundle,
            pipe.processor,
            pipe.vision_cache,
            pipe.backend,
            max_batch=max_batch,
            max_cache_bytes=None if max_cache_mb is None else int(max_cache_mb * _MB),
            room=ROOM,
        )
        self._finished = self._failed = self._cancelled = 0
        self.cache_bytes = 0  # of the KV caches in memory after the last step
        self._changed = threading.Condition()  # guards what follows
        self._listeners: dict[Sequence, Callable[[Event], None]] = {}  # of the requests under way
        self._closing = self._dropping = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(not sequence.dropped for sequence in list(self._scheduler.waiting))

    @property
    def running(self) -> int:
        """Requests whose prompt has been taken up, or whose answer has begun."""
        return max(len(self._listeners) - self.queued, 0)

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        done = self._scheduler
        return Counters(done.num_prefills, done.num_steps, done.num_rows, self._finished, self._failed, self._cancelled)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Sequence:
        """Take on a request. The prompt is laid out here, in the caller's thread: milliseconds for a long one.

        on_event hears of Pieces, then of a Result or an error, in the batcher's thread: it must not block.

        Raises:
            InvalidInput: something that cannot be used as given, or more cache than there may ever be.
            Stopping: close was called.
        """
        sequence = self._scheduler.prepare(request)
        with self._changed:
            if self._closing:
                raise Stopping("server: it is stopping and takes no more requests; ask another, or later")
            self._listeners[sequence] = on_event
            self._scheduler.waiting.append(sequence)
            self._changed.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a request, as when its client is gone: before the next step it leaves, and its memory comes back.

        No event follows but one that is being delivered. Once the request has ended, nothing happens.
        """
        with self._changed:
            if self._listeners.pop(sequence, None) is not None:
                self._cancelled += 1
                self._scheduler.drop(sequence)
                self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer all that were taken on before, and end.

        After so many seconds (timeout) the requests that are left fail with Stopping.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        self._dropping = True  # the thread sees it before its next step
        self._thread.join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else 0.0)

    def _work(self) -> None:
        """The thread: until it is closed, step and deliver."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                while scheduler.idle and not self._closing:
                    self._changed.wait()
            if self._dropping or scheduler.idle:
                break
            moved = scheduler.step()
            self.cache_bytes = scheduler.cache_bytes
            for sequence in moved:
                self._tell(sequence)
        left = Stopping("server: it stopped before the answer was complete; ask again later")
        self._fail(list(self._listeners), left)
        self.cache_bytes = 0

    def _tell(self, sequence: Sequence) -> None:
        """Deliver what a step brought."""
        if sequence.error is not None:
            self._fail([sequence], sequence.error)
            return
        if sequence.piece:
            self._deliver(sequence, Piece(sequence.piece, tuple(sequence.piece_logprobs)))
        if sequence.finish_reason is not None:
            self._finished += 1
            self._deliver(sequence, sequence.result(), last=True)

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """End requests by what was raised; what is none of our errors goes to the log, its kind alone to the client."""
        if not isinstance(error, HawkError):
            _LOG.error("a request failed", exc_info=error)
            error = BackendError(f"failed: {type(error).__name__}, which is in the server's log")
        for sequence in sequences:
            self._failed += 1
            self._deliver(sequence, error, last=True)

    def _deliver(self, sequence: Sequence, event: Event, *, last: bool = False) -> None:
        with self._changed:
            listener = self._listeners.pop(sequence, None) if last else self._listeners.get(sequence)
        if listener is None:  # cancelled
            return
        try:
            listener(event)
        except Exception:  # what one client's listener does must not end other answers
            _LOG.exception("a listener failed; its request is cancelled")
            self.cancel(sequence)
