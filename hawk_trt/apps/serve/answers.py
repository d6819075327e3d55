"""OpenAI's chat completions as pydantic models: what a client gets."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(0, description="Always 0: no prompt's keys and values outlive its request.")
    image_tokens: int = Field(description="The visual tokens, before pruning.")


class Usage(BaseModel):
    """Tokens of a request and its answer."""

    prompt_tokens: int = Field(description="Of the prompt as given, before pruning.")
    completion_tokens: int = Field(description="Of all answers together.")
    total_tokens: int
    visual_tokens: int = Field(description="Of the prompt's images, before pruning.")
    kept_visual_tokens: int = Field(description="Of these, what pruning kept.")
    query: str = Field(description="Which text scored the visual tokens: paper, turn or last, as in pruning.")
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason: TypeAlias = Annotated[
    Literal["stop", "length"], Field(description="length: max_tokens or the context ended the answer.")
]


class TopLogprob(BaseModel):
    """How probable a token was."""

    token: str
    logprob: float = Field(description="By the model's own logits, before penalties, biases and temperature.")
    bytes: list[int] = Field(description="Of the token in UTF-8; characters may go over several tokens.")


class TokenLogprob(TopLogprob):
    """How probable a token of the answer was, and which were the most probable ones."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The tokens of an answer, where the request asks for them."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: dict[Literal["role", "content"], str]
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None


class _Answer(BaseModel):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    hawk: dict[str, Any] | None = Field(None, description="Where the request asked for details.")


class Completion(_Answer):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage


class Chunk(_Answer):
    """A part of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Abilities(BaseModel):
    """An extension: what a request may ask for. keep_ratio, selector and query hold for a request that names none."""

    family: str
    dtype: str
    keep_ratio: float
    selector: str
    selectors: list[str]
    query: str | None
    max_tokens: int
    max_images: int
    max_body_bytes: int


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server began, in seconds since 1970.")
    owned_by: str = "hawk_trt"
    hawk: Abilities


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]
