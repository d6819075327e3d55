"""The HTTP application: OpenAI's chat completions over one pipeline."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from hawk_trt import __version__
from hawk_trt.apps.serve.exchange import Exchange
from hawk_trt.apps.serve.gate import Gate, check_key
from hawk_trt.apps.serve.metrics import CONTENT_TYPE
from hawk_trt.apps.serve.models import ModelList, served_model
from hawk_trt.apps.serve.openapi import CHAT_ANSWER, answer, chat_request, describe, errors
from hawk_trt.apps.serve.page import page_routes
from hawk_trt.apps.serve.refusal import Refusal, failed
from hawk_trt.apps.serve.service import Service
from hawk_trt.apps.serve.settings import ServeSettings

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

_bearer = HTTPBearer(auto_error=False, description="One of the server's keys.")


def create_app(pipe: "Pipeline", settings: ServeSettings) -> FastAPI:
    """Make the application; `app.state.service` is what its requests share.

    Its lifespan warms the pipeline up and, at the end, finishes what runs. The caller closes the pipeline.

    Raises:
        InvalidInput: a bundle without a tokenizer.
    """
    service = Service(pipe, settings)
    model = served_model(pipe, settings, int(time.time()))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        await service.close()
        await warming

    # Their pages would load scripts from elsewhere; the description itself is at /openapi.json.
    app = FastAPI(title="hawk_trt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    describe(app, settings.model_name)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Gate, metrics=service.metrics)

    async def with_key(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        check_key(request.headers.get("authorization"), settings.api_keys)

    keyed = [Depends(with_key)] if settings.api_keys else []

    @app.post(
        "/v1/chat/completions",
        dependencies=keyed,
        summary="Answer a chat",
        responses={200: CHAT_ANSWER, **errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504)},
        openapi_extra=chat_request(settings.model_name),
    )
    async def chat_completions() -> Response:
        return Exchange(service)

    @app.get(
        "/v1/models",
        dependencies=keyed,
        summary="List the models",
        responses={200: answer("ModelList", "The one model of this server."), **errors(401)},
    )
    async def models() -> Response:
        return _json(200, ModelList("list", [model]))

    @app.get(
        "/v1/models/{name:path}",
        dependencies=keyed,
        summary="Tell of one model",
        responses={200: answer("Model", "The model."), **errors(401, 404)},
    )
    async def one_model(name: str) -> Response:
        if name != model.id:
            message = f"model: got {name[:100]!r}, expected {model.id!r}, the one that is served"
            raise Refusal(404, message, param="model", code="model_not_found")
        return _json(200, model)

    @app.get("/health", summary="Whether the process answers", responses={200: {"description": "It does."}})
    async def health() -> Response:
        return _json(200, {"status": "ok"})

    @app.get(
        "/ready",
        summary="Whether requests are taken",
        responses={200: {"description": "They are."}, 503: {"description": "Warming up, stopping or failed."}},
    )
    async def ready() -> Response:
        taken = service.state == "ready" and service.batcher.ready
        return _json(200 if taken else 503, {"status": service.state})

    @app.get(
        "/metrics",
        dependencies=keyed,
        summary="Counts and times for Prometheus",
        responses={
            200: {
                "description": "Prometheus's text format.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **errors(401),
        },
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal), "registered for no other"
        return Response(error.json(), error.status, error.headers)

    async def wrong_address(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for no other"
        refusal = Refusal(error.status_code, str(error.detail), code=f"http_{error.status_code}")
        return Response(refusal.json(), refusal.status, {**refusal.headers, **(error.headers or {})})

    async def crashed(_: Request, __: Exception) -> Response:
        refusal = failed()
        return Response(refusal.json(), refusal.status, refusal.headers)

    if settings.page:
        app.router.routes.extend(page_routes())
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, wrong_address)
    app.add_exception_handler(Exception, crashed)
    return app


def _json(status: int, content: object) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
