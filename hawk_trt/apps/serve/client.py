"""Client: the other end of one HTTP request. Every wait for it, or on its behalf, ends when it leaves or time is up."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.types import Receive, Send

from hawk_trt.apps.serve.refusal import Refusal
from hawk_trt.errors import DeadlinePassed

T = TypeVar("T")
_LAST_SECONDS = 5.0


class ClientGone(Exception):
    """The client closed its connection: nobody waits for an answer."""


class Client:
    """One request's connection.

    Attributes:
        begun: when the request's headers were there, on the clock of time.monotonic().
        deadline: when its answer must be complete, on the same clock.
        answering: whether a response was begun.
    """

    def __init__(self, receive: Receive, send: Send, seconds: float) -> None:
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self.answering = False
        self._receive = receive
        self._send = send
        self._gone: asyncio.Task[None] | None = None

    async def body(self, max_bytes: int, seconds: float, hold: Callable[[int], None]) -> bytes:
        """The request's body; from then on the client is watched.

        Args:
            max_bytes: of it.
            seconds: until it must be here.
            hold: is told how many bytes there are.

        Raises:
            Refusal: too large, too slow, or by hold.
            ClientGone: the client left.
        """
        try:
            body = await asyncio.wait_for(self._body(max_bytes, hold), seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, f"body: not received within {seconds:g} seconds", code="body_timeout") from None
        self._gone = asyncio.create_task(self._left())
        return body

    async def until(self, work: Awaitable[T], seconds: float = float("inf")) -> T:
        """The outcome of some work, which is cancelled when nobody waits for it any more.

        Raises:
            ClientGone: the client left.
            DeadlinePassed: seconds, or the request's, are over.
        """
        task = asyncio.ensure_future(work)
        assert self._gone is not None, "the body is read first"
        left = max(min(self.deadline - time.monotonic(), seconds), 0.0)
        try:
            await asyncio.wait({task, self._gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._gone.done():
                raise ClientGone
            raise DeadlinePassed("deadline: the answer was not complete in time")
        finally:
            task.cancel()

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin the response."""
        self.answering = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, content: bytes) -> None:
        """Send a part of the response's body; a client that does not read it in time ends the request."""
        await self.until(self._send({"type": "http.response.body", "body": content, "more_body": True}))

    async def answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        """Send a whole response."""
        await self.begin(status, {**headers, "content-length": str(len(content))})
        await self.finish(content)

    async def finish(self, content: bytes) -> None:
        """Send the last part of the response, also to a client whose time is up.

        Raises:
            ClientGone: it is not read.
        """
        last = self._send({"type": "http.response.body", "body": content, "more_body": False})
        try:
            await asyncio.wait_for(last, _LAST_SECONDS)
        except asyncio.TimeoutError:
            raise ClientGone from None

    def close(self) -> None:
        """Watch no longer."""
        if self._gone is not None:
            self._gone.cancel()

    async def _body(self, max_bytes: int, hold: Callable[[int], None]) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise Refusal(413, f"body: got more than {max_bytes:,} bytes", code="body_too_large")
            hold(len(body))
            if not message.get("more_body"):
                return bytes(body)

    async def _left(self) -> None:
        """Return when the client closes its connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
