"""POST /v1/chat/completions, from the first byte of the request's body to the last of the answer."""

import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import numpy as np
from fastapi import Depends, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from hawk_trt.apps.serve import answers
from hawk_trt.apps.serve.batcher import Piece
from hawk_trt.apps.serve.errors import ApiError, api_error
from hawk_trt.apps.serve.prompt import Prepared
from hawk_trt.apps.serve.service import OpenRequest, Service
from hawk_trt.models.internvl import tile_grid
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.request import PruningConfig, Result, Timings, TokenLogprobs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from hawk_trt.pipeline import Pipeline


# the last keeps nginx from gathering the events
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
IGNORED = "x-hawk-ignored"
_MAX_NAMES = 16
_MAX_NAME_CHARS = 80
_PRUNING = ("keep_ratio", "min_visual_tokens", "selector", "query", "quota", "keep_mass", "diversity")
_LEAST_LOGPROB = -9999.0  # JSON has no infinity
# The letters by which byte-level tokenizers name bytes: printable Latin-1 as it is, the other bytes from 256 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


async def open_request(request: Request) -> AsyncIterator[OpenRequest]:
    """Accept the request, before its body is read, until its answer has been sent."""
    service: Service = request.app.state.service
    with service.open() as opened:
        yield opened


async def chat_completions(
    request: Request, response: Response, opened: Annotated[OpenRequest, Depends(open_request)]
) -> answers.Completion | StreamingResponse:
    """Answer a chat, whole or streamed."""
    service = opened.service
    with anyio.fail_after(opened.deadline - time.monotonic()):
        prepared = await service.prepare(await _body(request, opened), opened)
    opened.hold_choices(prepared.choices)
    opened.hold(prepared.pixel_bytes)  # in place of the body, which nothing needs any more
    await service.in_thread(partial(opened.submit, prepared.requests()))
    seconds = service.settings.first_token_seconds
    with anyio.move_on_after(opened.begun + seconds - time.monotonic()) as waiting:
        first = await opened.next_event()
    if waiting.cancelled_caught:
        message = f"The answer did not begin within {seconds:g} seconds. Try again later."
        raise ApiError(503, message, code="queue_timeout", retry=True)
    service.metrics.first_token_seconds.observe(time.monotonic() - opened.begun)
    head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    head["model"] = service.settings.model_name
    ignored = _ignored_header(prepared)
    if prepared.chat.stream:
        events = _events(opened, prepared, first, head)
        return StreamingResponse(events, headers=_STREAM_HEADERS | ignored, media_type="text/event-stream")
    response.headers.update(ignored)
    results: dict[int, Result] = {}
    shown: list[list[TokenLogprobs]] = [[] for _ in range(prepared.choices)]
    async for index, event in _all_events(opened, first):
        if isinstance(event, Piece):
            shown[index] += event.logprobs
        else:
            results[index] = event
    usage, details = await _finish(opened, prepared, results)
    choices = [
        answers.Choice(
            index=index,
            message=answers.AnswerMessage(content=result.text or ""),
            finish_reason=result.finish_reason,
            logprobs=_logprobs(service, prepared, shown[index]),
        )
        for index, result in sorted(results.items())
    ]
    return answers.Completion(**head, choices=choices, usage=usage, hawk=details)


def _ignored_header(prepared: Prepared) -> dict[str, str]:
    """Tells of the keys that nothing reads; a key of odd characters is a client's, and must not end the header."""
    names = [re.sub(r"[^\w.\[\]-]", "?", name, flags=re.ASCII)[:_MAX_NAME_CHARS] for name in prepared.ignored]
    more = ["..."] if len(names) > _MAX_NAMES else []
    return {IGNORED: ", ".join([*names[:_MAX_NAMES], *more])} if names else {}


async def _body(request: Request, opened: OpenRequest) -> bytes:
    settings = opened.service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # web pages of others can send forms and plain text, but not this
        message = f"content-type: got {kind[:60]!r}, expected application/json"
        raise ApiError(415, message, param="content-type", code="unsupported_media_type")
    most, length = settings.max_body_bytes, request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise ApiError(413, f"body: got {int(length):,} bytes, expected at most {most:,}", code="body_too_large")
    body = bytearray()
    try:
        with anyio.fail_after(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(413, f"body: got more than {most:,} bytes", code="body_too_large")
                opened.hold(len(body))
    except TimeoutError:
        message = f"body: not received within {settings.body_seconds:g} seconds"
        raise ApiError(408, message, code="body_timeout") from None
    return bytes(body)


async def _all_events(
    opened: OpenRequest, first: tuple[int, Piece | Result]
) -> AsyncIterator[tuple[int, Piece | Result]]:
    """The events of all choices, after their first one."""
    yield first
    running = opened.num_choices - isinstance(first[1], Result)
    while running:
        event = await opened.next_event()
        running -= isinstance(event[1], Result)
        yield event


async def _events(
    opened: OpenRequest, prepared: Prepared, first: tuple[int, Piece | Result], head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The answers as server-sent events. An error is an event too, since the status has been sent by then."""
    try:
        for index in range(opened.num_choices):
            begun = answers.ChunkChoice(index=index, delta={"role": "assistant", "content": ""})
            yield _sse(answers.Chunk(**head, choices=[begun]))
        results: dict[int, Result] = {}
        usage, details = None, None
        async for index, event in _all_events(opened, first):
            if isinstance(event, Piece):
                logprobs = _logprobs(opened.service, prepared, event.logprobs)
                choice = answers.ChunkChoice(index=index, delta={"content": event.text}, logprobs=logprobs)
            else:
                results[index] = event
                choice = answers.ChunkChoice(index=index, delta={}, finish_reason=event.finish_reason)
                if len(results) == opened.num_choices:
                    usage, details = await _finish(opened, prepared, results)
            yield _sse(answers.Chunk(**head, choices=[choice], hawk=details))
        options = prepared.chat.stream_options
        if options is not None and options.include_usage:
            yield _sse(answers.Chunk(**head, choices=[], usage=usage))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # whatever it is, the client waits for an end
        opened.service.metrics.broken_streams.inc()
        yield _sse(api_error(error).body)


async def _finish(
    opened: OpenRequest, prepared: Prepared, results: Mapping[int, Result]
) -> tuple[answers.Usage, dict[str, Any] | None]:
    """Count the complete answers; their usage, and the details of the first where the request asks for them."""
    service = opened.service
    for result in results.values():
        service.metrics.answered(result, prepared.prompt_tokens)
    generated, first = sum(len(result.token_ids) for result in results.values()), results[0]
    service.metrics.request_seconds.observe(time.monotonic() - opened.begun)
    usage = answers.Usage(
        prompt_tokens=prepared.prompt_tokens,
        completion_tokens=generated,
        total_tokens=prepared.prompt_tokens + generated,
        visual_tokens=first.num_visual,
        kept_visual_tokens=first.num_kept,
        query=first.query,
        prompt_tokens_details=answers.PromptTokensDetails(cached_tokens=0, image_tokens=first.num_visual),
    )
    if not (prepared.chat.hawk and prepared.chat.hawk.details):
        return usage, None
    return usage, await service.in_thread(partial(details_of, service.pipe, prepared, first))


def _logprobs(service: Service, prepared: Prepared, tokens: Iterable[TokenLogprobs]) -> answers.Logprobs | None:
    """Tokens as the protocol has them, None where the request does not ask for them."""
    if prepared.request.logprobs is None:
        return None

    chat = service.pipe.processor.chat
    assert chat is not None  # the service does not start without one

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        content = _token_bytes(chat.tokenizer, token_id)
        text = content.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(content)}

    return answers.Logprobs(
        content=[
            answers.TokenLogprob(
                **named(token.token_id, token.logprob),
                top_logprobs=[answers.TopLogprob(**named(*top)) for top in token.top],
            )
            for token in tokens
        ]
    )


def _token_bytes(tokenizer: "Tokenizer", token_id: int) -> bytes:
    """What one token spells in UTF-8: perhaps a part of a character, nothing where the tokenizer lacks the token."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in text:  # not whole characters
        name = tokenizer.id_to_token(token_id) or ""
        if all(letter in _BYTE_OF for letter in name):
            return bytes(_BYTE_OF[letter] for letter in name)
    return text.encode()


def _sse(content: BaseModel) -> bytes:
    """A server-sent event."""
    return b"data: " + content.model_dump_json().encode() + b"\n\n"


def details_of(pipe: "Pipeline", prepared: Prepared, result: Result) -> dict[str, Any]:
    """The details of one answer, as plain JSON values.

    Returns:
        "keep_ratio" and the others of _PRUNING: of the request. "seconds": by stage. "images", none where the prompt
        has a video, else one an image:
        "grid", its visual tokens in time, height and width (a tile is a step in time); "size", its width and height;
        "tiles", columns and rows, where it was cut into tiles: what is over in time is the whole image once more;
        "scores", one a visual token, row by row; "kept", the indices of the kept ones among these.
    """
    pruning = prepared.request.pruning or PruningConfig()
    details: dict[str, Any] = {name: getattr(pruning, name) for name in _PRUNING}
    details["query"] = result.query
    details["seconds"] = {stage.name: getattr(result.timings, stage.name) for stage in fields(Timings)}
    details["images"] = []
    if not prepared.sizes:
        return details
    layout = pipe.processor.layout(replace(prepared.inputs, pixel_values=None))  # the places alone are read
    visual = layout.visual_rows >= 0
    items, is_kept = layout.items[visual], np.isin(layout.source_index[visual], result.kept_indices)
    merge = pipe.family.vision.spatial_merge_size
    for number, ((frames, rows, columns), (width, height)) in enumerate(
        zip(layout.image_grid_thw, prepared.sizes, strict=True)
    ):
        own = items == number
        details["images"].append(
            {
                "grid": [int(frames), int(rows) // merge, int(columns) // merge],
                "size": [width, height],
                "tiles": _tiles(pipe, int(frames), width, height),
                "scores": result.scores[own].tolist(),
                "kept": np.flatnonzero(is_kept[own]).tolist(),
            }
        )
    return details


def _tiles(pipe: "Pipeline", count: int, width: int, height: int) -> list[int] | None:
    vision = pipe.family.vision
    if count == 1 or not isinstance(vision, InternVLVision):
        return None
    count -= vision.use_thumbnail
    return list(tile_grid(height, width, vision.image_size, count, count))
