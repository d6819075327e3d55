"""Batcher: many clients' jobs on one pipeline, in a thread of its own.

Jobs wait in the order in which they came. Between two decode steps one of them is prefilled, or some short ones of like
length together, so that the answers under way never stand still for long, and joins those; what has ended leaves.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from hawk_trt.apps.serve.batch import ROOM, Batch, column_bytes, columns_needed
from hawk_trt.apps.serve.job import Event, Failed, Finished, Job, Piece, Ticket
from hawk_trt.errors import BackendError, DeadlinePassed, HawkError, InvalidInput, QueueFull, Stopping
from hawk_trt.pipeline import Pipeline
from hawk_trt.row import Row
from hawk_trt.run import Run

__all__ = ["Batcher", "Counters", "Event", "Failed", "Finished", "Job", "Piece", "Ticket"]

# Measured on two CPU cores (make bench-batching): up to 8 rows each answer takes less time, 16 brought nothing more.
DEFAULT_MAX_BATCH = 8
DEFAULT_MAX_QUEUE = 64
# Prompts that wait are run together up to so many tokens, with so much more than their own for padding: 6 to 16 % less
# processor time was measured for 2 to 8 short ones. Longer ones gain less, and hold up the answers under way.
_JOINT_TOKENS = 1024
_MAX_PADDING = 1.25
_MB = 1_000_000
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """What a batcher has done since it began.

    prefills: of a prompt, or of several together.  steps: decode steps.  rows: rows of all decode steps together.
    finished, failed, cancelled: jobs that ended so.
    """

    prefills: int = 0
    steps: int = 0
    rows: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class Batcher:
    """Runs jobs on one pipeline. Close it, or use it as a context manager.

    Nobody else may run answers on the pipeline meanwhile; prepare and layout may be called from any thread.

    Attributes:
        max_batch: rows of a decode step, at most; 1 where the backend takes one generation after the other (TensorRT).
        max_queue: jobs that wait, at most.
        max_cache_bytes: of the KV caches of all rows together, None without bound. While rows are gathered, one tensor
            of one layer comes on top.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_queue: int = DEFAULT_MAX_QUEUE,
        max_cache_mb: float | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name}: got {value!r}, expected an integer of at least 1")
        if max_cache_mb is not None and not 0 < max_cache_mb < float("inf"):
            raise InvalidInput(f"max_cache_mb: got {max_cache_mb!r}, expected megabytes above 0, or None")
        self.max_batch = max_batch if pipe.backend.can_gather else 1
        self.max_queue = max_queue
        self.max_cache_bytes = None if max_cache_mb is None else int(max_cache_mb * _MB)
        self._pipe = pipe
        self._column_bytes = column_bytes(pipe)
        self._room = ROOM if pipe.backend.can_gather else None
        self._batch = Batch(pipe)
        self._running: dict[Row, Ticket] = {}
        self._counters = Counters()
        self._cache_bytes = 0
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Ticket] = deque()
        self._closing = self._dropping = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._closing

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs whose answer has begun."""
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Of the KV caches in memory after the last step."""
        return self._cache_bytes

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        return replace(self._counters)

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Ticket:
        """Take on a job. The prompt is laid out here, in the caller's thread: milliseconds for a long one.

        Args:
            job: what to answer.
            on_event: hears of Pieces, then of Finished or Failed, in the batcher's thread: it must not block.

        Raises:
            InvalidInput: something that cannot be used as given, or more cache than there may ever be.
            QueueFull: as many jobs wait as may.
            Stopping: close was called.
        """
        begun = time.perf_counter()
        row = Row(
            self._pipe,
            job.inputs,
            job.pruning,
            job.max_new_tokens,
            job.sampling,
            job.stop,
            job.ignore_eos,
            job.return_logits,
        )
        self._check_size(row)
        ticket = Ticket(job, row, on_event, self._withdraw, begun)
        with self._changed:
            if self._closing:
                raise Stopping("server: it is stopping and takes no more requests; ask another, or later")
            if (waiting := len(self._waiting)) >= self.max_queue:
                raise QueueFull(f"queue: {waiting} requests wait already, the most that may; ask again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _withdraw(self, ticket: Ticket) -> None:
        """What Ticket.cancel does."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._counters.cancelled += 1

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more jobs and end.

        Args:
            drain: answer all that was taken on before; else those jobs fail with Stopping.
            timeout: seconds for that, after which the jobs left fail with Stopping; None is as long as it takes.
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

    def _check_size(self, row: Row) -> None:
        """Refuse what can never be run."""
        context = self._pipe.backend.max_context
        if context is not None and row.kept_total > context:
            raise InvalidInput(
                f"prompt: got {row.kept_total} tokens kept, expected at most {context}, what the engines hold. "
                "Lower keep_ratio, or rebuild with a larger --max-context: python -m engines"
            )
        if not self._within_bound(needed := self._bytes([row])):
            assert self.max_cache_bytes is not None
            raise InvalidInput(
                f"prompt: got {row.kept_total} tokens kept and up to {row.limit} to generate, {needed / _MB:.1f} MB of "
                f"KV cache; expected at most {self.max_cache_bytes / _MB:.1f} MB. Lower keep_ratio or max_new_tokens, "
                "or raise max_cache_mb"
            )

    def _work(self) -> None:
        """The thread: until it is closed, admit, step, deliver."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
            if self._dropping or not (self._waiting or self._running):
                break
            try:
                self._end_late_and_cancelled()
                self._prefill_next()
                if self._running:
                    self._step()
            except Exception as error:  # the rows of a step share its fate; those that wait do not
                self._fail_all(list(self._running.values()), error)
            self._cache_bytes = self._batch.cache_bytes
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        stopping = Stopping("server: it stopped before the answer was complete; ask again later")
        self._fail_all([*self._running.values(), *waiting], stopping)
        self._cache_bytes = 0

    def _end_late_and_cancelled(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [t for t in self._waiting if t.job.deadline is not None and t.job.deadline <= now]
            for ticket in late:
                self._waiting.remove(ticket)
        for ticket in late:
            self._fail(ticket, DeadlinePassed("deadline: it passed before the answer had begun"))
        for ticket in list(self._running.values()):
            if ticket.cancelled:
                self._leave(ticket)
                with self._changed:
                    self._counters.cancelled += 1
            elif ticket.job.deadline is not None and ticket.job.deadline <= now:
                done = len(ticket.row.token_ids)
                self._fail(ticket, DeadlinePassed(f"deadline: it passed after {done} tokens of the answer"))

    def _prefill_next(self) -> None:
        """Run the prompts that wait longest, if there is room for them; none overtakes another."""
        with self._changed:
            tickets = self._next_tickets()
            for _ in tickets:
                self._waiting.popleft()
        if not tickets:
            return
        rows = [ticket.row for ticket in tickets]
        self._running.update(zip(rows, tickets, strict=True))
        if self._batch.rows and not self._within_bound(self._batch.cache_bytes + self._bytes(rows)):
            self._batch.gathered()  # the memory of rows that have left
        self._prefill(tickets)

    def _next_tickets(self) -> list[Ticket]:
        """What the next prefill runs: the first that waits, and those right behind it that lose little by joining."""
        taken: list[Ticket] = []
        lengths: list[int] = []
        for ticket in self._waiting:
            lengths.append(ticket.row.layout.num_tokens)
            padded = len(lengths) * max(lengths)
            alike = padded <= min(_JOINT_TOKENS, sum(lengths) * _MAX_PADDING)
            if taken and not (alike and np.array_equal(ticket.row.head_weights, taken[0].row.head_weights)):
                break
            if not self._fits([*(other.row for other in taken), ticket.row]):
                break
            taken.append(ticket)
        return taken

    def _prefill(self, tickets: Sequence[Ticket]) -> None:
        """Run prompts together; where that fails each alone, since one's fault is no other's."""
        self._counters.prefills += 1
        run = Run(self._pipe, [ticket.row for ticket in tickets], time.perf_counter())
        try:
            outputs = run.prefill(self._room)
        except Exception as error:  # whatever a caller's selector or a fault of ours raises must not end other answers
            if len(tickets) == 1:
                self._fail_all(tickets, error)
                return
            for ticket in tickets:
                self._prefill([ticket])
            return
        self._batch.join(run)
        timings = run.rows[0].timings
        for number, ticket in enumerate(tickets):
            ticket.row.timings = replace(timings, preprocess=ticket.preprocess)
            try:
                piece = ticket.row.take(outputs, number, run.where)
            except Exception as error:  # one row's numbers are no other row's
                self._fail_all([ticket], error)
            else:
                self._progress(ticket, piece)

    def _fits(self, more: Sequence[Row]) -> bool:
        rows = [*self._batch.rows, *more]
        if len(rows) > self.max_batch:
            return False
        return self._within_bound(self._bytes(rows))

    def _bytes(self, rows: Sequence[Row]) -> int:
        """Of the caches of these rows at their longest, side by side."""
        return len(rows) * columns_needed(rows) * self._column_bytes

    def _within_bound(self, cache_bytes: int) -> bool:
        return self.max_cache_bytes is None or cache_bytes <= self.max_cache_bytes

    def _step(self) -> None:
        self._counters.steps += 1
        self._counters.rows += len(self._batch.rows)
        for row, outcome in self._batch.step():
            if isinstance(outcome, HawkError):
                self._fail(self._running[row], outcome)
            else:
                self._progress(self._running[row], outcome)

    def _progress(self, ticket: Ticket, piece: str) -> None:
        """Deliver new text, and the result where the row has ended."""
        row, result = ticket.row, None
        if row.finished:
            piece += row.flush()
            row.timings.total = time.perf_counter() - ticket.begun
            result = row.result()
            self._leave(ticket)
            self._counters.finished += 1
        if piece:
            self._deliver(ticket, Piece(piece))
        if result is not None:
            self._deliver(ticket, Finished(result))

    def _fail(self, ticket: Ticket, error: HawkError) -> None:
        self._leave(ticket)
        self._counters.failed += 1
        self._deliver(ticket, Failed(error))

    def _fail_all(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """End jobs by what was raised; what is none of our errors goes to the log, and its kind alone to the client."""
        if not isinstance(error, HawkError):
            _LOG.error("jobs failed: %d", len(tickets), exc_info=error)
            error = BackendError(f"failed: {type(error).__name__}, which is in the server's log")
        for ticket in tickets:
            self._fail(ticket, error)

    def _leave(self, ticket: Ticket) -> None:
        self._running.pop(ticket.row, None)
        self._batch.leave(ticket.row)

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.on_event(event)
        except Exception:  # what one client's listener does must not end other answers
            _LOG.exception("a listener failed; its job is cancelled")
            ticket.cancelled = True
