"""The request of /v1/chat/completions, as OpenAI's protocol has it: JSON in, ChatRequest out.

Every field of the protocol is named here. What this server does not do is refused unless it is left at the value
that asks for nothing; a field that the protocol does not know is refused too.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from hawk_trt.apps.serve.refusal import invalid, unsupported
from hawk_trt.request import QUERIES, QUOTAS, SELECTORS

Ignored: TypeAlias = Annotated[Any, Meta(description="Taken and ignored: it does not change the answer.")]


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text of a message."""

    text: str


class ImageUrl(Struct, frozen=True, forbid_unknown_fields=True):
    """Where an image is."""

    url: Annotated[
        str,
        Meta(
            description="A data URL (data:image/png;base64,...) of a PNG, JPEG, WebP, GIF or BMP file, or an http(s) "
            "address of a host that the server allows.",
            examples=["data:image/png;base64,iVBORw0KGgo..."],
        ),
    ]
    detail: Annotated[
        Literal["auto", "low", "high"],
        Meta(description="low shrinks the image to fit 512 x 512 pixels first; the others leave it as it is."),
    ] = "auto"


class ImagePart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="image_url"):
    """An image of a user's message."""

    image_url: ImageUrl


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: Annotated[
        str,
        Meta(
            description="developer is the same as system.",
            extra_json_schema={"enum": ["system", "developer", "user", "assistant"]},
        ),
    ]
    content: Annotated[
        str | list[TextPart | ImagePart] | None,
        Meta(description="Text, or texts and images in the order in which the model reads them."),
    ] = None
    name: Annotated[Any, Meta(description="Not supported.")] = None
    refusal: Annotated[Any, Meta(description="Not supported.")] = None
    audio: Annotated[Any, Meta(description="Not supported.")] = None
    annotations: Annotated[Any, Meta(description="Not supported.")] = None
    tool_calls: Annotated[Any, Meta(description="Not supported.")] = None
    tool_call_id: Annotated[Any, Meta(description="Not supported.")] = None
    function_call: Annotated[Any, Meta(description="Not supported.")] = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a streamed answer holds besides."""

    include_usage: Annotated[
        bool | None, Meta(description="Send one more chunk before the end, without choices, with the usage.")
    ] = False
    include_obfuscation: Ignored = None


class Pruning(Struct, frozen=True, forbid_unknown_fields=True):
    """How many visual tokens are kept and who chooses them; what is left out is as the server was told."""

    keep_ratio: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="Share of the visual tokens kept; 1 prunes nothing.", examples=[0.2]),
    ] = None
    selector: Annotated[
        str | None, Meta(description="Who chooses.", extra_json_schema={"enum": [*SELECTORS, None]})
    ] = None
    query: Annotated[
        str | None,
        Meta(
            description="Text that scores the visual tokens: paper, what follows the last image; turn, all of the "
            "last user turn.",
            extra_json_schema={"enum": [*QUERIES, None]},
        ),
    ] = None
    quota: Annotated[
        str | None,
        Meta(
            description="One selection over all images, or one for each.", extra_json_schema={"enum": [*QUOTAS, None]}
        ),
    ] = None
    min_visual_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None, Meta(description="At least so many are kept.")
    ] = None
    keep_mass: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="Keep the fewest tokens with this share of the score mass, at most the keep ratio."),
    ] = None
    diversity: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Share of the kept tokens chosen among near-ties for being unlike the others."),
    ] = None
    seed: Annotated[Annotated[int, Meta(ge=0, le=2**63 - 1)] | None, Meta(description="Of selector random.")] = None


class HawkOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer tells besides."""

    details: Annotated[
        bool, Meta(description="Tell the seconds of each stage, and of each image its grid, scores and kept tokens.")
    ] = False


class ChatRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A chat to continue."""

    model: Annotated[str, Meta(description="A name that /v1/models lists.")]
    messages: Annotated[list[ChatMessage], Meta(min_length=1, description="Oldest first; the last one is answered.")]
    pruning: Annotated[Pruning | None, Meta(description="An extension: the visual tokens of this request.")] = None
    hawk: Annotated[HawkOptions | None, Meta(description="An extension: what else the answer tells.")] = None
    stream: Annotated[bool | None, Meta(description="Send the answer as server-sent events while it grows.")] = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**31)] | None,
        Meta(description="Longest answer in tokens, at most the server's limit, which is also the default."),
    ] = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**31)] | None, Meta(description="The older name of max_completion_tokens.")
    ] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None,
        Meta(description="0 takes the most probable token each time. Default: 1, unless the server was told another."),
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Draw from the fewest tokens that have this probability together."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="The same seed and request give the same answer."),
    ] = None
    stop: Annotated[
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=4)]
        | None,
        Meta(description="Texts that end the answer and are not part of it."),
    ] = None
    n: Annotated[Any, Meta(description="Only 1.")] = None
    frequency_penalty: Annotated[Any, Meta(description="Only 0.")] = None
    presence_penalty: Annotated[Any, Meta(description="Only 0.")] = None
    logit_bias: Annotated[Any, Meta(description="Only empty.")] = None
    logprobs: Annotated[Any, Meta(description="Only false.")] = None
    top_logprobs: Annotated[Any, Meta(description="Not supported.")] = None
    response_format: Annotated[Any, Meta(description='Only {"type": "text"}.')] = None
    tools: Annotated[Any, Meta(description="Only empty.")] = None
    tool_choice: Annotated[Any, Meta(description="Only none or auto.")] = None
    functions: Annotated[Any, Meta(description="Only empty.")] = None
    function_call: Annotated[Any, Meta(description="Only none or auto.")] = None
    modalities: Annotated[Any, Meta(description='Only ["text"].')] = None
    audio: Annotated[Any, Meta(description="Not supported.")] = None
    prediction: Annotated[Any, Meta(description="Not supported.")] = None
    reasoning_effort: Annotated[Any, Meta(description="Only none.")] = None
    verbosity: Annotated[Any, Meta(description="Only medium.")] = None
    web_search_options: Annotated[Any, Meta(description="Not supported.")] = None
    store: Annotated[Any, Meta(description="Only false: nothing is kept.")] = None
    service_tier: Annotated[Any, Meta(description="Only auto or default.")] = None
    parallel_tool_calls: Ignored = None
    metadata: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


# The values, besides null, that ask for nothing which this server does not do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}
_DECODER = msgspec.json.Decoder(ChatRequest)
_PATH = " - at `$."


def read_request(body: bytes) -> ChatRequest:
    """Read and check the body of a request, all that can be checked without a model.

    Raises:
        Refusal: it is not JSON, not of this shape, or asks for what this server does not do.
    """
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(_PATH)
        where = path.rstrip("`")
        if not where and "unknown field" in message:
            where = message.split("`")[1]
        raise invalid(f"{where or 'body'}: {_explained(message, where)}", where or None) from None
    except msgspec.DecodeError as error:
        raise invalid(f"body: {error}. Send JSON in UTF-8", code="invalid_json") from None
    except UnicodeDecodeError as error:  # msgspec leaves this one to Python
        raise invalid(f"body: not UTF-8 ({error.reason})", code="invalid_json") from None
    except RecursionError:
        raise invalid("body: JSON nested too deeply", code="invalid_json") from None
    _refuse_unsupported(request, _NEUTRAL, "")
    for index, chat_message in enumerate(request.messages):
        _refuse_unsupported(chat_message, _NEUTRAL_IN_MESSAGE, f"messages[{index}].")
    if request.stream_options is not None and not request.stream:
        raise invalid('stream_options: only with "stream": true', "stream_options")
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise invalid("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    return request


def _refuse_unsupported(value: Struct, neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    for name, allowed in neutral.items():
        got = getattr(value, name)
        if got is None or any(got == entry and type(got) is type(entry) for entry in allowed):
            continue
        expected = "leave it out" + "".join(f" or give {msgspec.json.encode(entry).decode()}" for entry in allowed[:1])
        raise unsupported(f"{where}{name}", got, expected)


def _explained(message: str, where: str) -> str:
    """A message of the decoder, with what this server expects where that is not plain from it."""
    if message.startswith("Invalid value") and where.endswith(".type"):
        return f"got {message.removeprefix('Invalid value ')}, expected text or image_url"
    return message[0].lower() + message[1:]
