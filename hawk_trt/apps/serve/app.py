"""The HTTP application: OpenAI's chat completions over one pipeline."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from hawk_trt import __version__
from hawk_trt.apps.serve.answers import Abilities, Chunk, Completion, Model, ModelList
from hawk_trt.apps.serve.chat import IGNORED, chat_completions
from hawk_trt.apps.serve.errors import ApiError, ErrorBody, error_response
from hawk_trt.apps.serve.metrics import CONTENT_TYPE
from hawk_trt.apps.serve.middleware import RequestMiddleware
from hawk_trt.apps.serve.page import page_routes
from hawk_trt.apps.serve.protocol import ChatRequest, check_model
from hawk_trt.apps.serve.service import Service
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import HawkError
from hawk_trt.request import SELECTORS

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

_CHAT = "/v1/chat/completions"
_SCHEMAS = "#/components/schemas/{model}"
_DESCRIPTION = (
    "OpenAI's chat completions over a vision-language model whose visual tokens are pruned. `pruning` chooses how many "
    "are kept and by whom, `usage` tells how many there were and how many were kept, and `hawk` asks for the times "
    "of the stages and the scores of every image."
)
_ERRORS = {
    400: "The request is wrong in itself, or asks for what this server does not do; `param` names it.",
    401: "No key of this server.",
    403: "Another server's name in Host, or a page of others in Origin.",
    404: "No such model.",
    408: "The body took too long to arrive.",
    413: "The body or a fetched image is too large.",
    415: "The body is not application/json.",
    429: "As many requests wait as may. Retry-After says when to come back.",
    500: "The server failed; its log says why.",
    503: "Warming up, stopping, or the answer did not begin in time. Retry-After says when to come back.",
    504: "The answer was not complete in time.",
}
_EVENT = {
    "type": "object",
    "description": "An event.",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A Chunk as JSON, an ErrorBody as JSON, or [DONE]."}},
}


def create_app(pipe: "Pipeline", settings: ServeSettings) -> FastAPI:
    """Make the application; `app.state.service` is what its requests share.

    Its lifespan warms the pipeline up and, at the end, finishes what runs. The caller closes the pipeline.
    """
    service = Service(pipe, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        await service.close()
        await warming

    # The pages of FastAPI would load scripts from elsewhere. The description is a route of ours, behind the key.
    app = FastAPI(title="hawk_trt", version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.model = _model(pipe, settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a page sends a dozen of its own
            allow_private_network=True,  # Chrome asks, before a page of the internet calls this machine
            expose_headers=["x-request-id", "retry-after", IGNORED],
        )
    app.add_middleware(RequestMiddleware, metrics=service.metrics, settings=settings)
    app.include_router(_open)
    app.include_router(_keyed, dependencies=[Depends(_check_key)] if settings.api_keys else [])
    if settings.page:
        app.router.routes.extend(page_routes())
    for kind in (HawkError, HTTPException, TimeoutError):
        app.add_exception_handler(kind, _explain)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]  # FastAPI's own way to extend the description
    return app


async def _explain(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path[:100]}: {error.detail}"
        error.detail = f"{asked}. Questions go to POST {_CHAT}: the base_url of a client ends in /v1"
    return error_response(error)


async def _check_key(
    request: Request,
    got: Annotated[
        HTTPAuthorizationCredentials | None,
        Depends(HTTPBearer(auto_error=False, description="One of the server's keys.")),
    ],
) -> None:
    """Compare a request's key with those of the server, in a time that does not tell how much of it is right."""
    key = "" if got is None else got.credentials
    settings: ServeSettings = request.app.state.service.settings
    matches = [hmac.compare_digest(key.encode(), known.encode()) for known in settings.api_keys]
    if not any(matches):
        message = "authorization: expected a key of this server: Authorization: Bearer KEY"
        raise ApiError(401, message, param="authorization", code="invalid_api_key")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _ERRORS[status], "model": ErrorBody} for status in statuses}


_open = APIRouter()
_keyed = APIRouter()
_keyed.post(
    _CHAT,
    summary="Answer a chat",
    response_model=Completion,
    responses={
        200: {
            "description": "The answer; with `stream`, server-sent events with a Chunk each, `[DONE]` last.",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **_errors(*_ERRORS),
    },
)(chat_completions)


@_keyed.get("/v1/models", summary="List the models", responses=_errors(401))
async def models(request: Request) -> ModelList:
    """The one model of this server."""
    return ModelList(data=[request.app.state.model])


@_keyed.get("/v1/models/{name:path}", summary="Describe one model", responses=_errors(401, 404))
async def one_model(name: str, request: Request) -> Model:
    """The model, and what a request may ask of it."""
    model: Model = request.app.state.model
    check_model(name, model.id)
    return model


@_keyed.get(
    "/metrics",
    summary="Counts and times for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "Prometheus's text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_errors(401),
    },
)
async def metrics(request: Request) -> Response:
    """All that the server counts."""
    return Response(request.app.state.service.metrics.text(), headers={"content-type": CONTENT_TYPE})


@_keyed.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The description of this server."""
    return JSONResponse(request.app.openapi())


@_keyed.api_route("/v1/completions", methods=["GET", "POST"], include_in_schema=False)
@_keyed.api_route("/v1/responses", methods=["GET", "POST"], include_in_schema=False)
async def other_protocol(request: Request) -> None:
    """OpenAI's other ways to ask, for which a client may have been set up."""
    message = f"{request.url.path}: this server does not have it. Use {_CHAT}: the same question as messages"
    raise ApiError(404, message, code="unknown_url")


@_open.head("/health", include_in_schema=False)
@_open.get("/health", summary="Whether the process answers")
async def health() -> dict[str, str]:
    """200 while it does."""
    return {"status": "ok"}


@_open.head("/ready", include_in_schema=False)
@_open.get("/ready", summary="Whether the server accepts requests", responses={503: {"description": "Not now."}})
async def ready(request: Request, response: Response) -> dict[str, str]:
    """200 while it does; 503 while it warms up or stops, or where it could not start."""
    service: Service = request.app.state.service
    response.status_code = 200 if service.ready else 503
    return {"status": service.state}


def _model(pipe: "Pipeline", settings: ServeSettings) -> Model:
    manifest = pipe.bundle.manifest
    return Model(
        id=settings.model_name,
        created=int(time.time()),
        hawk=Abilities(
            family=manifest.family,
            dtype=manifest.dtype,
            keep_ratio=settings.pruning.keep_ratio,
            selector=str(settings.pruning.selector),
            selectors=list(SELECTORS),
            query=settings.pruning.query,
            max_tokens=settings.max_tokens,
            max_images=settings.max_images,
            max_body_bytes=settings.max_body_bytes,
        ),
    )


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, made when it is first asked for. FastAPI adds all but the body of a chat.

    FastAPI would read a body that it knows of before it looks at key and limits.
    """
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
        _, found = models_json_schema([(ChatRequest, "validation"), (Chunk, "serialization")], ref_template=_SCHEMAS)
        model = app.state.model.id
        found["$defs"]["ChatRequest"]["properties"]["model"]["enum"] = [model, None]
        schema["components"]["schemas"].update(found["$defs"])
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}}
        asked = {"role": "user", "content": [picture, {"type": "text", "text": "What colour is the heart?"}]}
        example = {"model": model, "messages": [asked], "pruning": {"keep_ratio": 0.2}, "temperature": 0}
        content = {"schema": {"$ref": _SCHEMAS.format(model="ChatRequest")}, "examples": {"image": {"value": example}}}
        body = {"required": True, "content": {"application/json": content}}
        schema["paths"][_CHAT]["post"]["requestBody"] = body
        app.openapi_schema = schema
    return app.openapi_schema
