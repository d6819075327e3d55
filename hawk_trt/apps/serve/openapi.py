"""The OpenAPI description of the server: what it takes, what it answers, and every error."""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hawk_trt.apps.serve.answers import Chunk, Completion
from hawk_trt.apps.serve.models import Model, ModelList
from hawk_trt.apps.serve.protocol import ChatRequest

DESCRIPTION = (
    "OpenAI's chat completions over a vision-language model whose visual tokens are pruned. `pruning` chooses how many "
    "are kept and by whom, `usage` tells how many there were and how many were kept, and `hawk` asks for the times "
    "of the stages and the scores of every image."
)
_REF = "#/components/schemas/{name}"
_ERROR = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What was got and what was expected."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The part of the request that is at fault."},
                "code": {"type": "string", "description": "For programs."},
            },
        }
    },
}
_ERRORS = {
    400: "The request is wrong in itself, or asks for what this server does not do; `param` names it.",
    401: "No key of this server.",
    404: "No such model.",
    405: "Another method.",
    408: "The body took too long to arrive.",
    413: "The body or a fetched image is too large.",
    415: "The body is not application/json.",
    429: "As many requests wait as may. Retry-After says when to come back.",
    500: "The server failed; its log says why.",
    503: "Warming up, stopping, or the answer did not begin in time. Retry-After says when to come back.",
    504: "The answer was not complete in time.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route."""
    schema = {"$ref": _REF.format(name="Error")}
    return {
        status: {"description": _ERRORS[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def answer(name: str, description: str) -> dict[str, Any]:
    """A JSON response of one of the components."""
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}}


CHAT_ANSWER = answer("Completion", "The answer; with `stream`, server-sent events with a Chunk each, `[DONE]` last.")
CHAT_ANSWER["content"]["text/event-stream"] = {
    "schema": {
        "type": "object",
        "description": "An event.",
        "required": ["data"],
        "properties": {"data": {"type": "string", "description": "A Chunk as JSON, an Error as JSON, or [DONE]."}},
    }
}


def chat_request(model: str) -> dict[str, Any]:
    """The body of /v1/chat/completions, with examples."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}}
    asked = {"role": "user", "content": [picture, {"type": "text", "text": "What colour is the heart?"}]}
    image = {"model": model, "messages": [asked], "pruning": {"keep_ratio": 0.2}, "temperature": 0, "max_tokens": 32}
    text = {"model": model, "messages": [{"role": "user", "content": "Hello."}], "stream": True}
    examples = {
        "image": {"summary": "An image, at a fifth of its visual tokens", "value": image},
        "text": {"summary": "Text, streamed", "value": text},
    }
    schema = {"$ref": _REF.format(name="ChatRequest")}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}
    }


def describe(app: FastAPI, model: str) -> None:
    """Give an app its description, made when it is first asked for, with the name of its model."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
            _, components = msgspec.json.schema_components(
                [ChatRequest, Completion, Chunk, Model, ModelList], ref_template=_REF
            )
            components["ChatRequest"]["properties"]["model"]["enum"] = [model]
            schema.setdefault("components", {}).setdefault("schemas", {}).update({**components, "Error": _ERROR})
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the description
