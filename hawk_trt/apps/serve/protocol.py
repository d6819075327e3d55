"""OpenAI's chat completions as pydantic models: what a client sends.

The fields are what the server reads. It refuses keys that ask for what it cannot do (refused), takes those that it does
not know, and tells of them (ignored_keys); it refuses such keys of pruning and hawk, which are its own.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hawk_trt.apps.serve.errors import ApiError, invalid
from hawk_trt.request import QUERIES, QUOTAS, SELECTORS

_PART_TYPES = ("text", "input_text", "output_text", "image_url", "input_image", "image", "video_url")
_UNION_TYPE = re.compile(r"(constrained-)?str|list\[.*\]|\[key\]")
# Keys from which other servers read a part of the prompt (Ollama's images, Anthropic's system): here it would be lost.
_ELSEWHERE = {
    *("text", "image", "images", "image_url", "image_urls", "url", "base64", "video", "videos", "video_url"),
    *("audio", "input_audio", "file", "files", "attachments", "experimental_attachments"),
    *("system", "prompt", "input", "instructions"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _keys(names: str, *values: object) -> dict[str, tuple[object, ...]]:
    return dict.fromkeys(names.split(), values)


class _Open(_Strict):
    """Takes keys that it does not know, as a client's library or another server may have more of them."""

    model_config = ConfigDict(extra="allow")
    # But not those that change the answer elsewhere: each has the values, beside null, at which it asks for nothing.
    refused: ClassVar[dict[str, tuple[object, ...]]] = {}


def _names(known: Sequence[object]) -> Any:  # noqa: ANN401 - as pydantic's Field takes it
    """Adds the names to the description; PruningConfig checks them."""
    return {"enum": [*known, None]}


_Text: TypeAlias = Annotated[str, Field(min_length=1)]
_TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**31)]
Ignored: TypeAlias = Annotated[Any, Field(description="Taken and ignored: it does not change the answer.")]


class TextPart(_Open):
    """Text of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class _Sized(_Open):
    model_config = ConfigDict(str_strip_whitespace=True)  # around an address

    refused = _keys(
        "min_pixels max_pixels resized_height resized_width total_pixels fps sample_fps nframes num_frames min_frames "
        "max_frames video_start video_end"
    )


class ImageUrl(_Sized):
    """Where an image is."""

    url: str = Field(
        description="A data URL (data:image/png;base64,...) of a PNG, JPEG, WebP, GIF or BMP file, the base64 alone, "
        "or an http(s) address of a host that the server allows.",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        "auto", description="low shrinks the image to fit 512 x 512 pixels first; the others leave it as it is."
    )


class _Shown(_Sized):
    field: ClassVar[str]

    @property
    def source(self) -> "ImageUrl | VideoUrl":
        """Where it is."""
        found: ImageUrl | VideoUrl = getattr(self, self.field)
        return found


class ImagePart(_Shown):
    """An image of a user's message; input_image and image are other libraries' names of the same."""

    type: Literal["image_url", "input_image", "image"]
    image_url: ImageUrl = Field(description="An object; a text is its url.")
    field: ClassVar[str] = "image_url"

    @model_validator(mode="before")
    @classmethod
    def _one_shape(cls, got: object) -> object:
        if not isinstance(got, dict):
            return got
        part = dict(got)
        if part.get("type") == "image" and "image_url" not in part:
            name = next((name for name in ("image", "url", "base64") if part.get(name) is not None), None)
            part |= {"image_url": part.pop(name)} if name else {}
        if isinstance(part.get("image_url"), str):
            part["image_url"] = {"url": part["image_url"]}
            if "detail" in part:  # of an input_image
                part["image_url"]["detail"] = part.pop("detail")
        return part


class VideoUrl(_Sized):
    """Where a video is."""

    url: str = Field(
        description="A data URL (data:video/mp4;base64,...) of a video file, or an http(s) address of a host that the "
        "server allows.",
        examples=["data:video/mp4;base64,AAAAIGZ0eXA..."],
    )


class VideoPart(_Shown):
    """A video of a user's message, as vLLM has it."""

    type: Literal["video_url"]
    video_url: VideoUrl = Field(description="An object; a text is its url.")
    field: ClassVar[str] = "video_url"

    @field_validator("video_url", mode="before")
    @classmethod
    def _as_object(cls, got: object) -> object:
        return {"url": got} if isinstance(got, str) else got


class ChatMessage(_Open):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is the same as system.")
    content: (
        str
        | Annotated[list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]], Field(min_length=1)]
    ) = Field(
        description="Text, or texts, images and videos in the order in which the model reads them; null is an empty "
        "answer of the assistant."
    )
    refused = _keys("refusal audio tool_call_id function_call") | _keys("annotations tool_calls", [])

    @property
    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """The content; a text is its one part."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, got: object) -> object:
        if isinstance(got, dict) and got.get("role") == "assistant" and got.get("content") is None:
            return {**got, "content": ""}
        return got


class StreamOptions(_Open):
    """What a streamed answer holds besides."""

    include_usage: bool | None = Field(False, description="Send one more chunk at the end, with the usage alone.")
    include_obfuscation: Ignored = None


class Pruning(_Strict):
    """How many visual tokens are kept and who chooses them; the server's own setting holds for what is left out."""

    keep_ratio: float | None = Field(None, gt=0, le=1, description="Share of the visual tokens kept.", examples=[0.2])
    selector: str | None = Field(
        None, description="The rule that chooses the kept tokens.", json_schema_extra=_names(SELECTORS)
    )
    query: str | None = Field(
        None,
        description="What scores the visual tokens: the text after the last image (paper), the last user turn, or the "
        "prompt's last token.",
        json_schema_extra=_names(QUERIES),
    )
    quota: str | None = Field(
        None, description="One selection over all images, or one for each.", json_schema_extra=_names(QUOTAS)
    )
    min_visual_tokens: int | None = Field(None, ge=1, le=1_000_000, description="At least so many are kept.")
    keep_mass: float | None = Field(
        None, gt=0, le=1, description="Keep the fewest tokens with this share of the scores, at most keep_ratio."
    )
    diversity: float | None = Field(
        None, ge=0, le=1, description="Share of the kept tokens chosen among near-ties for being unlike the others."
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Of selector random.")


class HawkOptions(_Strict):
    """What the answer tells besides."""

    details: bool | None = Field(
        False, description="The seconds of each stage; grid, scores and kept tokens of each image."
    )


class ChatRequest(_Open):
    """A chat to continue."""

    refused = {
        **_keys("audio prediction web_search_options allowed_token_ids chat_template prompt_logprobs"),
        **_keys("guided_choice guided_grammar guided_json guided_regex structured_outputs truncate_prompt_tokens"),
        **_keys("tools functions bad_words documents stop_token_ids", []),
        **_keys("chat_template_kwargs mm_processor_kwargs", {}),
        **_keys("continue_final_message echo include_stop_str_in_output use_beam_search", False),
        **_keys("tool_choice function_call", "none", "auto"),
        **_keys("best_of length_penalty", 1),
        **_keys("response_format", {"type": "text"}),
        **_keys("modalities", ["text"]),
        **_keys("reasoning_effort", "none"),
        **_keys("verbosity", "medium"),
        **_keys("add_generation_prompt", True),
        **_keys("min_tokens", 0),
    }
    model: str | None = Field(None, description="A name that /v1/models lists; there is one, so it may be left out.")
    messages: list[ChatMessage] = Field(min_length=1, description="Oldest first; the last one is answered.")
    pruning: Pruning | None = Field(None, description="An extension: the visual tokens of this request.")
    hawk: HawkOptions | None = Field(None, description="An extension: what else the answer tells.")
    stream: bool | None = Field(False, description="Send the answer as server-sent events while it grows.")
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        le=2**63 - 1,
        description="Longest answer in tokens, up to the server's limit, which is the default.",
    )
    max_tokens: int | None = Field(None, ge=1, le=2**63 - 1, description="The older name of max_completion_tokens.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 takes the most probable token; 1, unless the server has another default."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Draw from the fewest tokens that have this probability together."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="One request of one seed has one answer.")
    stop: _Text | Annotated[list[_Text], Field(max_length=64)] | None = Field(
        None, description="Texts that end the answer and are not part of it."
    )
    n: int | None = Field(None, ge=1, le=128, description="So many answers, within the server's limit; 1.")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logit of a token for each time that the answer holds it."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logits of the tokens that the answer holds."
    )
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="Added to the logits of tokens, by their ids."
    )
    logprobs: bool | None = Field(False, description="Give the log probability of each token, before penalties.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="With logprobs: also those of so many most probable tokens."
    )
    top_k: int | None = Field(
        None, ge=-1, le=2**31, description="As vLLM: draw from so many most probable tokens; 0 or -1 is all."
    )
    min_p: float | None = Field(None, ge=0, le=1, description="As vLLM: tokens of at least this share of the best.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="As vLLM: above 1, tokens of prompt and answer become less probable."
    )
    skip_special_tokens: bool | None = Field(True, description="As vLLM: leave special tokens out of the text.")
    ignore_eos: bool | None = Field(False, description="As vLLM: go on after a stop token, up to the longest answer.")
    parallel_tool_calls: Ignored = None
    metadata: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @field_validator("max_completion_tokens", "max_tokens", "seed", "n", "top_logprobs", "top_k", mode="before")
    @classmethod
    def _whole(cls, got: object) -> object:
        return int(got) if isinstance(got, float) and got.is_integer() else got  # an integer to JSON Schema too


def read_request(body: bytes) -> ChatRequest:
    """Read and check the body of a request: its JSON and shape, and that it asks for nothing that is not done here."""
    try:
        chat = ChatRequest.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise _explained(error) from None
    for place, model in _objects(chat):
        _check_keys(place, model)
    return chat


def check_model(got: str, served: str) -> None:
    """Refuse another model than the one that is served."""
    if got != served:
        message = f"model: got {got[:100]!r}, expected {served!r}, the one that is served"
        raise ApiError(404, message, param="model", code="model_not_found")


def ignored_keys(chat: ChatRequest) -> list[str]:
    """The places of keys that the server does not know and that hold something: messages[0].name."""
    unread = ["stream_options"] if chat.stream_options is not None and not chat.stream else []
    return unread + [
        f"{place}{key}"
        for place, model in _objects(chat)
        for key, value in (model.model_extra or {}).items()
        if value is not None and key not in model.refused
    ]


def _objects(chat: ChatRequest) -> Iterator[tuple[str, _Open]]:
    """A chat and all in it that may have more keys, each with the start of their places: messages[0]."""
    yield "", chat
    if chat.stream_options is not None and chat.stream:
        yield "stream_options.", chat.stream_options
    for index, message in enumerate(chat.messages):
        yield f"messages[{index}].", message
        for number, part in enumerate(message.parts):
            place = f"messages[{index}].content[{number}]."
            yield place, part
            if not isinstance(part, TextPart):
                yield f"{place}{part.field}.", part.source


def _check_keys(place: str, model: _Open) -> None:
    """Refuse keys that ask for what is not done here, or that hold a part of the prompt."""
    lost = []
    for key, got in (model.model_extra or {}).items():
        if key not in model.refused:
            lost += [key] if got and key in _ELSEWHERE else []
            continue
        values = (None, *model.refused[key])
        # a null in an object says nothing, and some clients send every key that there is
        asked = {name: value for name, value in got.items() if value is not None} if isinstance(got, dict) else got
        if not any(asked == value and isinstance(asked, bool) == isinstance(value, bool) for value in values):
            instead = "leave it out" + "".join(f" or give {json.dumps(value)}" for value in values[1:2])
            message = f"{place}{key}: {_shown(got)}this server does not support that; {instead}"
            raise invalid(message, f"{place}{key}", "unsupported")
    if lost:
        where = place.removesuffix(".")
        message = f"got {', '.join(sorted(lost))}, where nothing is read; messages and their content hold the prompt"
        raise invalid(f"{where or 'body'}: {message}", where or None, "unsupported")


def _shown(got: object) -> str:
    """What came, for a message; nothing for an array or object, which may be large."""
    return f"got {got!r:.60}: " if isinstance(got, str | int | float) else ""


def _explained(error: ValidationError) -> ApiError:
    """The error of the place that lies deepest: for a union, pydantic names one for each of its types."""
    found = error.errors(include_url=False, include_context=False)
    deepest = max(found, key=lambda entry: len(entry["loc"]))
    place, kind, got = _place(deepest["loc"]), deepest["type"], deepest["input"]
    message = " or ".join(entry["msg"] for entry in found if _place(entry["loc"]) == place)
    if kind == "json_invalid":
        return invalid(f"body: {message}. Send JSON in UTF-8", code="invalid_json")
    if kind.startswith("union_tag"):  # none, or one that is not known
        message = f"got the type {got.get('type')!r:.60}, expected one of {', '.join(_PART_TYPES)}"
    else:
        message = _shown(got) + message
    return invalid(f"{place or 'body'}: {message}", place or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """messages[0].content[1].image_url.url, without the types of unions that pydantic writes between the fields."""
    place = ""
    for index, step in enumerate(loc):
        if isinstance(step, int):
            place += f"[{step}]"
            continue
        type_of_part = index and isinstance(loc[index - 1], int) and index + 1 < len(loc) and step in _PART_TYPES
        if not type_of_part and not _UNION_TYPE.fullmatch(step):
            place += f".{step}" if place else step
    return place
