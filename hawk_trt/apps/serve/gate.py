"""Gate: what every request passes. It gets an id, is counted by status, and its rest is read if nobody did."""

import asyncio
import hmac
import uuid
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hawk_trt.apps.serve.metrics import Metrics
from hawk_trt.apps.serve.refusal import Refusal

_DISCARD_SECONDS = 2.0
_MAX_ADDRESS_BYTES = 8_192
_MAX_HEADER_BYTES = 32_768


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        whole = not (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers)
        whole = whole or "expect" in headers  # then nothing comes before it is asked for
        status = 499  # nginx's number for a client that left; none is sent

        async def receiving() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body")
            return message

        async def discard() -> None:
            while not whole:
                await receiving()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not whole and status != 408:  # to close on a client that still sends would take the answer from it
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(discard(), _DISCARD_SECONDS)
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        request_id = uuid.uuid4().hex.encode("ascii")
        refusal = _too_long(scope)
        try:
            if refusal is None:
                await self._app(scope, receiving, sending)
            else:
                await Response(refusal.json(), refusal.status, refusal.headers)(scope, receiving, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()


def _too_long(scope: Scope) -> Refusal | None:
    """What is said of headers that no client of this server needs."""
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > _MAX_ADDRESS_BYTES:
        return Refusal(414, f"address: got more than {_MAX_ADDRESS_BYTES:,} bytes", code="address_too_long")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
        return Refusal(431, f"headers: got more than {_MAX_HEADER_BYTES:,} bytes", code="headers_too_large")
    return None


def check_key(authorization: str | None, keys: Sequence[str]) -> None:
    """Compare a request's key with those that open the server, in a time that does not tell how much of it is right.

    Raises:
        Refusal: none or another.
    """
    scheme, _, given = (authorization or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if not (any(matches) and scheme.lower() == "bearer"):
        message = "authorization: expected a key of this server: Authorization: Bearer KEY"
        raise Refusal(401, message, param="authorization", code="invalid_api_key")
