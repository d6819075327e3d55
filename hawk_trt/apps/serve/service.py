"""Service: one pipeline behind a server: its batcher, its threads, what it has taken on, and whether it is ready."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from hawk_trt.apps.serve.batcher import Batcher, Event, Failed, Finished, Job
from hawk_trt.apps.serve.metrics import Metrics
from hawk_trt.apps.serve.refusal import Refusal
from hawk_trt.apps.serve.remote_images import RemoteImages
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.request import SamplingConfig

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

State: TypeAlias = Literal["starting", "ready", "draining", "failed"]

_WARM_UP_PX = 224
_WARM_UP_TOKENS = 4
log = logging.getLogger("hawk_trt.apps.serve")


class Service:
    """What all requests of one server share.

    Attributes:
        pipe: the model.
        settings: of the server.
        batcher: runs the requests.
        metrics: of them.
        pool: threads for what would hold up the event loop.
        remote: fetches images.
        state: "starting" until warmed up, then "ready"; "draining" when it takes nothing more; "failed" where the
            warm-up failed.
    """

    def __init__(self, pipe: "Pipeline", settings: ServeSettings) -> None:
        """Take a pipeline over; the service closes its own threads, not the pipeline.

        Raises:
            InvalidInput: a bundle without a tokenizer.
        """
        if pipe.chat_tokenizer() is None:
            raise InvalidInput(
                "serve: this bundle has no tokenizer, so it cannot chat. Export a checkpoint folder with a "
                "tokenizer.json: make export"
            )
        self.pipe = pipe
        self.settings = settings
        # admitted() bounds what waits; the batcher itself would refuse a burst that the batch has room for
        self.batcher = Batcher(
            pipe, max_batch=settings.max_batch, max_queue=settings.max_open, max_cache_mb=settings.max_cache_mb
        )
        self.metrics = Metrics(self.batcher)
        self.pool = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="prepare")
        self.remote = RemoteImages(settings.remote_hosts, settings.max_body_bytes, settings.remote_seconds)
        self.state: State = "starting"
        self._open = 0
        self._waiting_bytes = 0

    @property
    def open(self) -> int:
        """Requests that are read, prepared, waiting or running."""
        return self._open

    async def warm_up(self) -> None:
        """Answer a text and an image, so that no client pays for what the first run of each sets up."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.pool, self._warm_up)
        except HawkError:
            self.state = "failed"
            log.exception("the warm-up failed, so the server is not ready")
            return
        if self.state == "starting":
            self.state = "ready"
            log.info("ready: %s", self.settings.model_name)

    def drain(self) -> None:
        """Take nothing more."""
        self.state = "draining"

    async def close(self) -> None:
        """Finish what was taken, within the limit, and stop."""
        self.drain()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.batcher.close, True, self.settings.drain_seconds)
        self.pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request's stay.

        Raises:
            Refusal: the server is not ready, or has as many as it takes.
        """
        if self.state != "ready":
            message = {"starting": "The server is warming up.", "draining": "The server is stopping."}
            text = message.get(self.state, "The server could not start.")
            raise Refusal(503, f"{text} Try again later.", code="not_ready", retry=True)
        if self._open >= self.settings.max_open:
            message_full = "The server has as many requests as it takes. Try again later."
            raise Refusal(429, message_full, code="queue_full", retry=True)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def hold(self, num_bytes: int) -> None:
        """Count bytes that a request brings along, or with a negative number no longer does.

        Raises:
            Refusal: all requests together would bring more than the server holds.
        """
        total = self._waiting_bytes + num_bytes
        # one alone is bounded by its own limits
        if num_bytes > 0 and self._open > 1 and total > self.settings.max_waiting_mb * 1_000_000:
            message = "The server holds as much data of requests as it may. Try again later."
            raise Refusal(429, message, code="memory_full", retry=True)
        self._waiting_bytes = total

    def _warm_up(self) -> None:
        grey = np.full((_WARM_UP_PX, _WARM_UP_PX, 3), 128, np.uint8)
        for images in ([], [grey]):
            self._answer(
                Job(
                    inputs=self.pipe.prepare("Hello.", images=images, max_pixels=self.settings.max_pixels),
                    pruning=self.settings.pruning,
                    max_new_tokens=_WARM_UP_TOKENS,
                    sampling=SamplingConfig(),
                    ignore_eos=True,
                )
            )

    def _answer(self, job: Job) -> None:
        done = threading.Event()
        failures: list[HawkError] = []

        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                failures.append(event.error)
            if isinstance(event, Failed | Finished):
                done.set()

        begun = time.monotonic()
        self.batcher.submit(job, on_event)
        if not done.wait(self.settings.request_seconds):
            raise BackendError(f"warm-up: not done after {time.monotonic() - begun:.0f} seconds")
        if failures:
            raise failures[0]
