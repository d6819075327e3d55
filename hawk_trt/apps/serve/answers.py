"""The answers of /v1/chat/completions: whole, or in chunks, as the protocol has them."""

import time
import uuid
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from hawk_trt.request import Result


class Usage(Struct, frozen=True):
    """What a request took."""

    prompt_tokens: Annotated[int, Meta(description="Of the prompt as given, before pruning.")]
    completion_tokens: int
    total_tokens: int
    visual_tokens: Annotated[int, Meta(description="Of the prompt's images, before pruning.")]
    kept_visual_tokens: Annotated[int, Meta(description="Of these, what pruning kept.")]


class AnswerMessage(Struct, frozen=True):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Choice(Struct, frozen=True):
    """The one choice of a whole answer."""

    index: int
    message: AnswerMessage
    finish_reason: Annotated[Literal["stop", "length"], Meta(description="length: max_tokens or the context ended it.")]
    logprobs: None = None


class Completion(Struct, frozen=True):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: Annotated[int, Meta(description="Seconds since 1970.")]
    model: str
    choices: list[Choice]
    usage: Usage
    hawk: Annotated[dict[str, Any] | None, Meta(description="Where the request asked for details.")] = None


class Delta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Struct, frozen=True):
    """The one choice of a chunk."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class Chunk(Struct, frozen=True):
    """A part of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    hawk: dict[str, Any] | None = None


class AnswerWriter:
    """Writes one answer, whole or in chunks, all with the same id."""

    def __init__(self, model: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, result: Result, usage: Usage, details: dict[str, Any] | None) -> bytes:
        """A whole answer as JSON."""
        message = AnswerMessage("assistant", result.text or "")
        choice = Choice(0, message, "stop" if result.finish_reason == "stop" else "length")
        return msgspec.json.encode(
            Completion(self._id, "chat.completion", self._created, self._model, [choice], usage, details)
        )

    def begin(self) -> bytes:
        """The first chunk."""
        return self._chunk(Delta(role="assistant", content=""))

    def piece(self, text: str) -> bytes:
        """A chunk with more text."""
        return self._chunk(Delta(content=text))

    def end(self, result: Result, details: dict[str, Any] | None) -> bytes:
        """The chunk that says why the answer ended."""
        return self._chunk(Delta(), "stop" if result.finish_reason == "stop" else "length", details)

    def usage(self, usage: Usage) -> bytes:
        """The chunk with the usage."""
        return event(Chunk(self._id, "chat.completion.chunk", self._created, self._model, [], usage))

    def _chunk(
        self, delta: Delta, finish: Literal["stop", "length"] | None = None, details: dict[str, Any] | None = None
    ) -> bytes:
        choice = ChunkChoice(0, delta, finish)
        return event(Chunk(self._id, "chat.completion.chunk", self._created, self._model, [choice], None, details))


DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def usage_of(result: Result, prompt_tokens: int) -> Usage:
    """What a request took."""
    answer = len(result.token_ids)
    return Usage(prompt_tokens, answer, prompt_tokens + answer, result.num_visual, result.num_kept)
