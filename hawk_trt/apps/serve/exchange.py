"""Exchange: one request of /v1/chat/completions, from its first byte to the last of its answer.

Whatever ends it, an answer, an error or the client's leaving, its job is cancelled and what was counted is given back.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hawk_trt.apps.serve.answers import DONE, AnswerWriter, Usage, event, usage_of
from hawk_trt.apps.serve.batcher import Event, Failed, Finished, Piece, Ticket
from hawk_trt.apps.serve.client import Client, ClientGone
from hawk_trt.apps.serve.conversation import check_remote, image_sources
from hawk_trt.apps.serve.details import details_of
from hawk_trt.apps.serve.preparation import Prepared, prepare
from hawk_trt.apps.serve.protocol import read_request
from hawk_trt.apps.serve.refusal import Refusal, failed, refusal_of
from hawk_trt.apps.serve.service import Service, log
from hawk_trt.errors import DeadlinePassed, HawkError
from hawk_trt.request import Result

T = TypeVar("T")
_JSON = {"content-type": "application/json"}
# the last keeps nginx from gathering the events
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Exchange(Response):
    """A response that reads its own request."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self._settings = service.settings
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._writer = AnswerWriter(service.settings.model_name)
        self._ticket: Ticket | None = None
        self._over = False
        self._begun = False
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say why not."""
        client = Client(receive, send, self._settings.request_seconds)
        try:
            try:
                with self._service.admitted():
                    try:
                        await self._answer(client, Headers(scope=scope))
                    finally:
                        self._end(client)
            except HawkError as error:
                await self._refuse(client, error)
            except (ClientGone, OSError):
                raise
            except Exception:  # a mistake in one request's handling must not end another's
                log.exception("a request failed")
                await self._refuse(client, failed())
        except (ClientGone, OSError):  # OSError: a server may raise it when it sends to who has left
            return

    async def _answer(self, client: Client, headers: Headers) -> None:
        _check_headers(headers, self._settings.max_body_bytes)
        prepared = await self._prepare(client)
        await self._in_pool(client, partial(self._submit, prepared))
        happened = await self._next(client)  # what fails before this has a status of its own
        if prepared.stream:
            await client.begin(200, _EVENTS)
            content = self._writer.begin()
        while isinstance(happened, Piece):
            if prepared.stream:
                await client.send(content + self._writer.piece(happened.text))
                content = b""
            happened = await self._next(client)
        assert isinstance(happened, Finished), "all other events are handled"
        usage, details = await self._told(client, prepared, happened.result)
        if not prepared.stream:
            await client.answer(200, _JSON, self._writer.whole(happened.result, usage, details))
            return
        content += self._writer.end(happened.result, details)
        if prepared.include_usage:
            content += self._writer.usage(usage)
        await client.finish(content + DONE)

    async def _prepare(self, client: Client) -> Prepared:
        """Read, check and prepare the request."""
        settings = self._settings
        body = await client.body(settings.max_body_bytes, settings.body_seconds, self._hold)
        request = await self._in_pool(client, partial(read_request, body))
        del body
        if request.model != settings.model_name:
            message = f"model: got {request.model[:100]!r}, expected {settings.model_name!r}, the one that is served"
            raise Refusal(404, message, param="model", code="model_not_found")
        sources = image_sources(request.messages, settings)
        check_remote(sources, bool(settings.remote_hosts))
        fetched = {}
        for source in sources:
            if source.remote:
                content = await client.until(self._service.remote.fetch(source.url, source.where))
                fetched[source.where] = content
                self._hold(self._held_bytes + len(content))
        work = partial(prepare, self._service.pipe, settings, request, sources, fetched, client.deadline)
        prepared = await self._in_pool(client, work)
        self._hold(prepared.tensor_bytes)  # in place of the body, which nothing needs any more
        return prepared

    def _submit(self, prepared: Prepared) -> None:
        """Hand the job to the batcher; in a thread, since it lays the prompt out."""
        self._ticket = self._service.batcher.submit(prepared.job, self._on_event)
        if self._over:  # the client left when there was no ticket to cancel yet
            self._ticket.cancel()

    def _on_event(self, happened: Event) -> None:
        """Bring an event over from the batcher's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, happened)
        except RuntimeError:  # the loop is closed, and this request with it
            return

    async def _next(self, client: Client) -> Event:
        """What the batcher says next; an error is raised."""
        if self._begun:
            happened = await client.until(self._events.get())
        else:
            most = self._settings.first_token_seconds
            try:
                happened = await client.until(self._events.get(), client.begun + most - time.monotonic())
            except DeadlinePassed:
                message = f"The answer did not begin within {most:g} seconds. Try again later."
                raise Refusal(503, message, code="queue_timeout", retry=True) from None
            self._begun = True
            self._service.metrics.first_token_seconds.observe(time.monotonic() - client.begun)
        if isinstance(happened, Failed):
            raise happened.error
        return happened

    async def _told(self, client: Client, prepared: Prepared, result: Result) -> tuple[Usage, dict[str, Any] | None]:
        """Usage and details of a complete answer, which is counted."""
        self._service.metrics.answered(result, prepared.prompt_tokens)
        self._service.metrics.request_seconds.observe(time.monotonic() - client.begun)
        usage = usage_of(result, prepared.prompt_tokens)
        if not prepared.details:
            return usage, None
        job = prepared.job
        prompt = replace(job.inputs, pixel_values=None)  # the places alone are read
        work = partial(details_of, self._service.pipe, prompt, prepared.sizes, job.pruning, result)
        return usage, await self._in_pool(client, work)

    async def _refuse(self, client: Client, error: HawkError) -> None:
        refusal = refusal_of(error)
        if refusal.status == 500 and error is not refusal:
            log.error("a request failed", exc_info=error)
        if client.answering:
            self._service.metrics.broken_streams.inc()
            await client.finish(event(refusal.content()))
        else:
            await client.answer(refusal.status, refusal.headers, refusal.json())

    async def _in_pool(self, client: Client, work: Callable[[], T]) -> T:
        return await client.until(self._loop.run_in_executor(self._service.pool, work))

    def _hold(self, num_bytes: int) -> None:
        """So many bytes belong to this request now."""
        self._service.hold(num_bytes - self._held_bytes)
        self._held_bytes = num_bytes

    def _end(self, client: Client) -> None:
        self._over = True
        if self._ticket is not None:
            self._ticket.cancel()
        self._hold(0)
        client.close()


def _check_headers(headers: Headers, max_body_bytes: int) -> None:
    """Refuse by its headers what need not be read.

    Raises:
        Refusal: not JSON, or too large.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # web pages of others can send forms and plain text, but not this
        message = f"content-type: got {kind[:60]!r}, expected application/json"
        raise Refusal(415, message, param="content-type", code="unsupported_media_type")
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > max_body_bytes:
        message = f"body: got {int(length):,} bytes, expected at most {max_body_bytes:,}"
        raise Refusal(413, message, code="body_too_large")
