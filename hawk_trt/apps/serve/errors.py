"""The errors that a client gets: an HTTP status, and a body in the shape of OpenAI's protocol."""

import logging
from functools import partial
from typing import Any

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hawk_trt.apps.serve.batcher import Stopping
from hawk_trt.errors import HawkError, InvalidInput

RETRY_SECONDS = 1
_MAX_CHARS = 500  # an error repeats what a client sent, and need not repeat all of it
_MAX_PARAM_CHARS = 200
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 404: "not_found_error"}
_LOG = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """Why a request has no answer."""

    message: str = Field(description="What was got and what was expected.")
    type: str
    param: str | None = Field(description="The part of the request that is at fault.")
    code: str = Field(description="For programs.")


class ErrorBody(BaseModel):
    """The body of every response that is no success, and the last event of a stream that broke."""

    error: ErrorDetail


class ApiError(HawkError):
    """A request that gets no answer: status, body and headers of the response.

    The body names no path of the server and holds no traceback.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry: bool = False) -> None:
        """Make an error; param is the part of the request that is at fault, retry whether it may succeed later."""
        message, param = _cut(message, _MAX_CHARS), None if param is None else _cut(param, _MAX_PARAM_CHARS)
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))
        self.headers: dict[str, str] = {}
        if retry:
            self.headers["retry-after"] = str(RETRY_SECONDS)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def __reduce__(self) -> Any:  # noqa: ANN401 - as object's own; a worker process sends its errors
        error = self.body.error
        retry = "retry-after" in self.headers
        return partial(ApiError, code=error.code, param=error.param, retry=retry), (self.status, error.message)


def _cut(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """The error that a client gets for an exception. The log alone says what went wrong within the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidInput):
        return invalid(str(error), str(error).partition(":")[0] if ":" in str(error) else None)
    if isinstance(error, Stopping):
        return ApiError(503, "The server is stopping. Try again later.", code="stopping", retry=True)
    if isinstance(error, TimeoutError):
        return ApiError(504, "The answer was not complete within the server's time limit.", code="timeout")
    if isinstance(error, HTTPException):  # of the router: no such path or method
        found = ApiError(error.status_code, str(error.detail), code=f"http_{error.status_code}")
        found.headers.update(error.headers or {})
        return found
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed to answer this request. Its log says why.", code="internal_error")


def error_response(error: Exception) -> Response:
    """The response that a client gets for an exception."""
    found = api_error(error)
    return Response(found.body.model_dump_json(), found.status, found.headers, "application/json")
