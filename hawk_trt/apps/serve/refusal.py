"""Refusal: what a client is told instead of an answer, as an HTTP status and an error in the protocol's shape."""

from collections.abc import Mapping
from typing import Any

import msgspec

from hawk_trt.errors import DeadlinePassed, HawkError, InvalidInput, QueueFull, Stopping

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
RETRY_SECONDS = 1


class Refusal(HawkError):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: for people; it never holds a path or a traceback.
        param: the part of the request that is at fault, None where it is none in particular.
        code: for programs.
        retry: whether the same request may succeed a little later.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry = retry

    @property
    def headers(self) -> Mapping[str, str]:
        """Of its response."""
        headers = {"content-type": "application/json"}
        if self.retry:
            headers["retry-after"] = str(RETRY_SECONDS)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def content(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        """Its content."""
        return msgspec.json.encode(self.content())


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A request that is wrong in itself."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str, value: object, expected: str) -> Refusal:
    """A part of the protocol that this server does not have."""
    # lists and objects may be large or deep
    shown = (
        repr(value)[:60]
        if isinstance(value, str | int | float)
        else f"a JSON {'array' if isinstance(value, list) else 'object'}"
    )
    return invalid(f"{param}: got {shown}, which this server does not support; {expected}", param, "unsupported")


def failed() -> Refusal:
    """What is told of an error within the server; the log tells the rest."""
    return Refusal(500, "The server failed to answer this request. Its log says why.", code="internal_error")


def refusal_of(error: HawkError) -> Refusal:
    """What a client is told of an error; those of the server's inside say nothing of it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InvalidInput):
        return invalid(str(error), str(error).partition(":")[0] if ":" in str(error) else None)
    if isinstance(error, QueueFull):
        message = "The server has as many requests waiting as it takes. Try again later."
        return Refusal(429, message, code="queue_full", retry=True)
    if isinstance(error, Stopping):
        return Refusal(503, "The server is stopping. Try again later.", code="stopping", retry=True)
    if isinstance(error, DeadlinePassed):
        return Refusal(504, "The answer was not complete within the server's time limit.", code="timeout")
    return failed()
