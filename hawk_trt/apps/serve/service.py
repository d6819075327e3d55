"""What all requests of one server share: the pipeline and its batcher, the limits in use, and whether it is ready."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import anyio
import anyio.to_thread
import numpy as np

from hawk_trt.apps.serve.batcher import Batcher, Event, Piece
from hawk_trt.apps.serve.errors import ApiError
from hawk_trt.apps.serve.metrics import Metrics
from hawk_trt.apps.serve.prompt import Preparation, Prepared, too_much
from hawk_trt.apps.serve.remote_images import RemoteImages
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.apps.serve.worker import Workers
from hawk_trt.errors import HawkError, InvalidInput
from hawk_trt.request import Request, Result
from hawk_trt.sequence import Sequence as Answer

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

T = TypeVar("T")
State: TypeAlias = Literal["starting", "ready", "draining", "failed"]

_WARM_UP_PX = 224
_WARM_UP_TOKENS = 4
log = logging.getLogger("hawk_trt.apps.serve")


class Service:
    """What all requests of one server share."""

    def __init__(self, pipe: "Pipeline", settings: ServeSettings) -> None:
        """Start a batcher on a pipeline; close() ends the batcher, not the pipeline."""
        if pipe.processor.chat is None:
            raise InvalidInput(
                "serve: this bundle has no tokenizer, so it cannot chat. Export a checkpoint folder with a "
                "tokenizer.json: hawk-trt export CHECKPOINT --out FOLDER"
            )
        self.pipe = pipe
        self.settings = settings
        self.batcher = Batcher(pipe, max_batch=settings.max_batch, max_cache_mb=settings.max_cache_mb)
        self.metrics = Metrics(self.batcher)
        self.remote_images = RemoteImages(settings.remote_hosts, settings.max_body_bytes, settings.remote_seconds)
        self.state: State = "starting"  # "ready" once warmed up, or "failed"; "draining" when it accepts nothing more
        self.open_requests = 0  # that are read, prepared, waiting or running
        self.open_choices = 0  # their answers
        self.held_bytes = 0  # of their bodies and image tensors
        self._preparation = Preparation(pipe.bundle, replace(settings, api_keys=()), settings.sampling(pipe.bundle))
        self._threads = anyio.CapacityLimiter(settings.preprocess_threads)
        self.workers = Workers(settings.preprocess_threads)  # prepare large requests

    @property
    def ready(self) -> bool:
        """Whether the server accepts requests."""
        return self.state == "ready" and self.batcher.ready

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do work that would block the event loop. A request that is cancelled meanwhile waits for its end."""
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def prepare(self, body: bytes, opened: "OpenRequest") -> Prepared:
        """Make a request of a body, and fetch its remote images and videos."""
        fetched: dict[str, bytes] = {}
        while True:
            prepare = partial(self._preparation.prepare, self.pipe.processor, body, fetched)
            prepared = await self.in_thread(prepare)
            if prepared is None:
                with tempfile.TemporaryDirectory() as folder:  # which goes even where the process was killed
                    work = partial(self._preparation.in_worker, body, fetched, Path(folder))
                    try:  # in a process, which ends with the request where that is cancelled
                        prepared = await self.workers.run(work)
                    except anyio.BrokenWorkerProcess:  # its time was over, or it broke at what it read
                        raise too_much() from None
            if isinstance(prepared, Prepared):
                return prepared
            for place, url in prepared.items():
                fetched[place] = await self.remote_images.fetch(url, place)
                opened.hold(opened.held_bytes + len(fetched[place]))

    async def warm_up(self) -> None:
        """Answer a text and an image, so that no client pays for what the first run of each sets up."""
        grey = np.full((_WARM_UP_PX, _WARM_UP_PX, 3), 128, np.uint8)
        try:
            for images in ([], [grey]):
                warm_up = Request(
                    "Hello.",
                    images,
                    pruning=self.settings.pruning,
                    max_new_tokens=_WARM_UP_TOKENS,
                    ignore_eos=True,
                    max_pixels=self.settings.max_pixels,
                )
                request = OpenRequest(self)
                await self.in_thread(partial(request.submit, [warm_up]))
                while not isinstance((await request.next_event())[1], Result):
                    pass
        except (HawkError, TimeoutError):
            self.state = "failed"
            log.exception("the warm-up failed, so the server is not ready")
            return
        if self.state == "starting":
            self.state = "ready"
            log.info("ready: %s", self.settings.model_name)

    async def close(self) -> None:
        """Finish the open requests, within the time limit, and stop."""
        self.state = "draining"
        await anyio.to_thread.run_sync(self.batcher.close, self.settings.drain_seconds)
        await anyio.to_thread.run_sync(self.workers.close)

    @contextmanager
    def open(self) -> "Iterator[OpenRequest]":
        """Take a request on, until the context ends."""
        if self.state != "ready":
            message = {"starting": "The server is warming up.", "draining": "The server is stopping."}
            text = message.get(self.state, "The server could not start.")
            raise ApiError(503, f"{text} Try again later.", code="not_ready", retry=True)
        request = OpenRequest(self)
        request.hold_choices(1)
        self.open_requests += 1
        try:
            yield request
        finally:
            self.open_requests -= 1
            request.close()


class OpenRequest:
    """One request that the server has accepted: the bytes that it holds, and the events of its answers."""

    def __init__(self, service: Service) -> None:
        self.begun = time.monotonic()
        self.deadline = self.begun + service.settings.request_seconds  # its answers must be complete then
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._submitted: list[Answer] = []
        self.num_choices = 0
        self.held_bytes = 0  # of its body, and of the tensors that come in its place
        self._closed = False

    def hold(self, num_bytes: int) -> None:
        """Count so many bytes for this request, in place of those that it held before."""
        service, more = self.service, num_bytes - self.held_bytes
        most = service.settings.max_waiting_mb * 1_000_000
        # one alone is bounded by its own limits
        if more > 0 and service.open_requests > 1 and service.held_bytes + more > most:
            message = "The server holds as much data of requests as it may. Try again later."
            raise ApiError(429, message, code="memory_full", retry=True)
        service.held_bytes += more
        self.held_bytes = num_bytes

    def hold_choices(self, count: int) -> None:
        """Count so many answers for this request, in place of those that it held before."""
        service, more = self.service, count - self.num_choices
        if more > 0 and service.open_choices + more > service.settings.max_open:
            message = "The server has as many requests as it takes. Try again later."
            raise ApiError(429, message, code="queue_full", retry=True)
        service.open_choices += more
        self.num_choices = count

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand the choices to the batcher; in a thread, since it lays the prompts out."""
        batcher = self.service.batcher
        for choice, request in enumerate(requests):
            answer = batcher.submit(request, partial(self._on_event, choice))
            self._submitted.append(answer)
            if self._closed:  # the client left when there was nothing to cancel yet
                batcher.cancel(answer)
                self._submitted.clear()
                return

    async def next_event(self) -> tuple[int, Piece | Result]:
        """More text of a choice, or its result; raises why there is none, or TimeoutError at the deadline."""
        with anyio.fail_after(self.deadline - time.monotonic()):
            choice, event = await self._events.get()
        if isinstance(event, HawkError):
            raise event
        return choice, event

    def close(self) -> None:
        """Cancel what runs and give the bytes back."""
        self._closed = True
        for answer in list(self._submitted):
            self.service.batcher.cancel(answer)
        self._submitted.clear()  # they lead back here, and would hold the tensors until the next garbage collection
        self.hold(0)
        self.hold_choices(0)

    def _on_event(self, choice: int, event: Event) -> None:
        """Bring an event over from the batcher's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))
        except RuntimeError:  # the loop is closed, and this request with it
            return
