"""Jobs through a batcher, as a server sends them: what its clients hear, and that it is what generate says alone."""

import threading
from dataclasses import dataclass, field

import numpy as np

from hawk_trt import Request
from hawk_trt.apps.serve.batcher import Piece
from hawk_trt.errors import HawkError
from hawk_trt.request import Result


@dataclass
class Heard:
    """What one client heard.

    gate: while it is not set, the batcher waits in this client's first event, so that others can come meanwhile.
    """

    gate: threading.Event | None = None
    events: list = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event):
        self.events.append(event)
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(60)
        if isinstance(event, Result | HawkError):
            self.ended.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    def result(self):
        assert self.ended.wait(60)
        assert not any(isinstance(event, Result | HawkError) for event in self.events[:-1])
        last = self.events[-1]
        if isinstance(last, HawkError):
            raise last
        return last


def ask(inputs, pruning, max_new_tokens=128, sampling=None, stop=(), **options):
    """A request, its prompt as tensors."""
    return Request(inputs, (), (), pruning, max_new_tokens, sampling, stop, **options)


def alone(pipe, request):
    """What generate makes of a request."""
    return pipe.generate_batch([request])[0]


def assert_same(heard, expected):
    """A client heard the expected answer."""
    got = heard.result()
    assert (got.token_ids, got.text, got.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)
    assert heard.text == (expected.text or "")
    assert (got.num_visual, got.num_kept) == (expected.num_visual, expected.num_kept)
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)
    if expected.logits is not None:
        np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


def assert_served_as_alone(pipe, batcher, jobs):
    """Every job, joining and leaving as it comes, is answered as generate answers it."""
    expected = [alone(pipe, job) for job in jobs]
    before = batcher.counters
    heard = [Heard() for _ in jobs]
    for job, client in zip(jobs, heard, strict=True):
        batcher.submit(job, client)
    for client, result in zip(heard, expected, strict=True):
        assert_same(client, result)
    after = batcher.counters
    assert after.rows - before.rows > after.steps - before.steps, "no two rows shared a step"
