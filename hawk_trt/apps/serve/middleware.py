"""What every HTTP request passes: an id, a look at who sent it, bounds for its headers, a count of its status.

A request ends when its client leaves. A server of one machine checks Host and Origin, since a web page may give its own
name the address 127.0.0.1 and then call the server as its own (DNS rebinding).
"""

import re
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hawk_trt.apps.serve.errors import ApiError, error_response
from hawk_trt.apps.serve.metrics import Metrics
from hawk_trt.apps.serve.settings import ServeSettings

_DISCARD_SECONDS = 2.0
_LAST_SECONDS = 5.0
_MAX_ADDRESS_BYTES = 8_192
_MAX_HEADER_BYTES = 32_768


class RequestMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: ServeSettings) -> None:
        self._app = app
        self._metrics = metrics
        self._hosts = settings.allowed_hosts
        self._origins = settings.cors_origins
        self._seconds = settings.request_seconds + _LAST_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; it is cancelled when its client leaves, or does not read the answer in time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # of a base_url that ends in a slash; the name of a model may begin with one
        scope["path"] = re.sub("(?<!/models)/+", "/", scope["path"]).rstrip("/") or "/"
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        discard = has_body and "expect" not in headers  # then nothing comes before it is asked for
        request_id = uuid.uuid4().hex.encode("ascii")
        received = False
        status = 499  # nginx's number for a client that left; none is sent

        async def receive_body() -> Message:
            nonlocal received
            if received:
                await anyio.sleep_forever()  # until left() ends the request
            message = await receive()
            if message["type"] == "http.disconnect":
                group.cancel_scope.cancel()
                await anyio.sleep_forever()
            if not message.get("more_body"):
                received = True
                group.start_soon(left)
            return message

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def send_answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if discard and status != 408:  # to close on a client that still sends would take the answer from it
                    with anyio.move_on_after(_DISCARD_SECONDS):
                        while not received:
                            await receive_body()
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            async with anyio.create_task_group() as group:
                group.cancel_scope.deadline = anyio.current_time() + self._seconds
                try:
                    error = _wrong_headers(scope, headers) or self._of_others(headers)
                    await (self._app if error is None else error_response(error))(scope, receive_body, send_answer)
                except Exception as error:  # a mistake in one request's handling must not end another's
                    response = error_response(error)
                    if status == 499:
                        await response(scope, receive_body, send_answer)
                group.cancel_scope.cancel()
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _of_others(self, headers: Headers) -> ApiError | None:
        """A request of a page, or under a name, that is not this server's."""
        if not self._hosts:
            return None
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not is_allowed(host, self._hosts):
            message = f"host: got {host[:100]!r}, which is no name of this server; --allowed-hosts adds names"
            return ApiError(403, message, param="host", code="host_not_allowed")
        if origin is None or origin in self._origins or "*" in self._origins:
            return None
        try:
            own = urlsplit(origin).netloc.lower()
        except ValueError:
            own = ""
        if not own or own != (host or "").lower():
            message = f"origin: got {origin[:100]!r}; --cors-origin names whose pages may call this server"
            return ApiError(403, message, param="origin", code="origin_not_allowed")
        return None


def is_allowed(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header, with or without a port, is one of the names; *.name is all below it, * is any."""
    name, _, after = host.rpartition(":")
    if not name or not after.isdigit():
        name = host
    name = name.lower().rstrip(".")
    return any(name.endswith(known[1:].lower()) if known.startswith("*") else name == known.lower() for known in names)


def _wrong_headers(scope: Scope, headers: Headers) -> ApiError | None:
    """Headers that no client of this server needs, or that say two things."""
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > _MAX_ADDRESS_BYTES:
        return ApiError(414, f"address: got more than {_MAX_ADDRESS_BYTES:,} bytes", code="address_too_long")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
        return ApiError(431, f"headers: got more than {_MAX_HEADER_BYTES:,} bytes", code="headers_too_large")
    if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may read another end of the body
        error = ApiError(
            400, "headers: got both Content-Length and Transfer-Encoding, expected one", code="two_lengths"
        )
        error.headers["connection"] = "close"
        return error
    return None
