"""Batcher: the scheduler in a thread of its own, for many clients.

In: requests, from any thread. Out: events, in the batcher's thread: pieces of text, then the result or an error.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.pipeline import Pipeline
from hawk_trt.request import Request, Result, TokenLogprobs
from hawk_trt.scheduler import DEFAULT_MAX_BATCH, ROOM, Scheduler
from hawk_trt.sequence import Sequence

DEFAULT_MAX_QUEUE = 64
_MB = 1_000_000
_LOG = logging.getLogger(__name__)


class QueueFull(HawkError):
    """As many requests wait as may; the same request can be taken later."""


class Stopping(HawkError):
    """The server ends: it takes no more requests, and gives up what it could not finish."""


class DeadlinePassed(HawkError):
    """A request was not done at its time limit."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer's text, never empty, and the log probabilities of its tokens where asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


# The last is a result, whose text is all pieces together, or the reason why there is none: DeadlinePassed, Stopping,
# InvalidInput (a selector's choice that cannot be used) or BackendError.
Event: TypeAlias = Piece | Result | HawkError


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that a batcher has taken on."""

    sequence: Sequence
    on_event: Callable[[Event], None]
    deadline: float | None  # on the clock of time.monotonic(), in seconds


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
        self,
        pipe: Pipeline,
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_queue: int = DEFAULT_MAX_QUEUE,
        max_cache_mb: float | None = None,
    ) -> None:
        """Start the thread. Bounds: rows of a step, requests that wait, megabytes of the KV caches of all rows."""
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name}: got {value!r}, expected an integer of at least 1")
        if max_cache_mb is not None and not 0 < max_cache_mb < float("inf"):
            raise InvalidInput(f"max_cache_mb: got {max_cache_mb!r}, expected megabytes above 0, or None")
        self._max_queue = max_queue
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
        self._cache_bytes = 0
        self._changed = threading.Condition()  # guards what follows
        self._tickets: dict[Sequence, Ticket] = {}
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
        return max(len(self._tickets) - self.queued, 0)

    @property
    def cache_bytes(self) -> int:
        """Of the KV caches in memory after the last step."""
        return self._cache_bytes

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        done = self._scheduler
        return Counters(done.num_prefills, done.num_steps, done.num_rows, self._finished, self._failed, self._cancelled)

    def submit(self, request: Request, on_event: Callable[[Event], None], deadline: float | None = None) -> Ticket:
        """Take on a request. The prompt is laid out here, in the caller's thread: milliseconds for a long one.

        on_event hears of Pieces, then of a Result or an error, in the batcher's thread: it must not block. deadline is
        on the clock of time.monotonic(), in seconds; None waits as long as it takes.

        Raises:
            InvalidInput: something that cannot be used as given, or more cache than there may ever be.
            QueueFull: as many requests wait as may.
            Stopping: close was called.
        """
        sequence = self._scheduler.prepare(request)
        ticket = Ticket(sequence, on_event, deadline)
        with self._changed:
            if self._closing:
                raise Stopping("server: it is stopping and takes no more requests; ask another, or later")
            if self.queued >= self._max_queue:
                raise QueueFull(f"queue: {self.queued} requests wait already, the most that may; ask again later")
            self._tickets[sequence] = ticket
            self._scheduler.waiting.append(sequence)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request, as when its client is gone: before the next step it leaves, and its memory comes back.

        No event follows but one that is being delivered. Once the request has ended, nothing happens.
        """
        with self._changed:
            if self._tickets.pop(ticket.sequence, None) is not None:
                self._cancelled += 1
                self._scheduler.drop(ticket.sequence)
                self._changed.notify()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests and end; drain answers all that was taken on before.

        Without drain, and after so many seconds (timeout), the requests that are left fail with Stopping.
        """
        with self._changed:
            self._closing = True
            self._dropping = self._dropping or not drain
            self._changed.notify()
        self._thread.join(timeout)
        self._dropping = True  # the thread sees it before its next step
        self._thread.join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _work(self) -> None:
        """The thread: until it is closed, step and deliver."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                while scheduler.idle and not self._closing:
                    self._changed.wait()
            if self._dropping or scheduler.idle:
                break
            self._end_late()
            moved = scheduler.step()
            self._cache_bytes = scheduler.cache_bytes
            for sequence in moved:
                self._tell(sequence)
        self._fail(list(self._tickets), Stopping("server: it stopped before the answer was complete; ask again later"))
        self._cache_bytes = 0

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

    def _end_late(self) -> None:
        """End the requests whose deadline has passed."""
        now = time.monotonic()
        for ticket in list(self._tickets.values()):
            if ticket.deadline is not None and ticket.deadline <= now:
                done = len(ticket.sequence.token_ids)
                when = f"after {done} tokens of the answer" if done else "before the answer had begun"
                self._fail([ticket.sequence], DeadlinePassed(f"deadline: it passed {when}"))
                self._scheduler.drop(ticket.sequence)

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
            ticket = self._tickets.pop(sequence, None) if last else self._tickets.get(sequence)
        if ticket is None:  # cancelled
            return
        try:
            ticket.on_event(event)
        except Exception:  # what one client's listener does must not end other answers
            _LOG.exception("a listener failed; its request is cancelled")
            self.cancel(ticket)
