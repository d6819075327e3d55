"""What a client asks of the batcher, and what it hears back: Job in, Ticket and events out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from hawk_trt.errors import HawkError
from hawk_trt.request import ModelInputs, PruningConfig, Result, SamplingConfig
from hawk_trt.row import Row


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to answer.

    Attributes:
        inputs: the prompt as Pipeline.prepare made it.
        pruning: how it is pruned.
        max_new_tokens: longest answer.
        sampling: how tokens are drawn.
        stop: strings that end the answer.
        deadline: on the clock of time.monotonic(), in seconds; None waits as long as it takes.
        ignore_eos: go on after a stop token.
        return_logits: give the logits of every step.
    """

    inputs: ModelInputs
    pruning: PruningConfig = field(default_factory=PruningConfig)
    max_new_tokens: int = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: Sequence[str] = ()
    deadline: float | None = None
    ignore_eos: bool = False
    return_logits: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer's text, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer is complete: the last event of its job. All pieces together are result.text."""

    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """A job ended without an answer: its last event.

    error is DeadlinePassed, Stopping, InvalidInput (a selector's choice that cannot be used) or BackendError.
    """

    error: HawkError


Event: TypeAlias = Piece | Finished | Failed


class Ticket:
    """A job that a batcher has taken on.

    Attributes:
        job: what to answer.
        row: its answer so far.
        on_event: hears of it.
        cancelled: whether nobody wants to hear any more.
        begun: when it came, by time.perf_counter().
        preprocess: seconds from then until it could wait for its turn.
    """

    def __init__(
        self,
        job: Job,
        row: Row,
        on_event: Callable[[Event], None],
        withdraw: "Callable[[Ticket], None]",
        begun: float,
    ) -> None:
        self.job = job
        self.row = row
        self.on_event = on_event
        self.cancelled = False
        self.begun = begun
        self.preprocess = time.perf_counter() - begun
        self._withdraw = withdraw

    def cancel(self) -> None:
        """End the job, as when its client is gone: before the next step it leaves, and its memory comes back.

        No event follows but one that is being delivered. Once the job has ended, nothing happens.
        """
        self._withdraw(self)
