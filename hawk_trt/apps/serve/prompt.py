"""A chat becomes a prompt for the pipeline: messages checked, images fetched and decoded, pruning and sampling settled.

What comes in is a stranger's: only data URLs and allowed addresses name images, only common formats are opened, and
the sizes of all images together are bounded before any of them is decoded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.apps.serve.errors import invalid
from hawk_trt.apps.serve.protocol import ChatMessage, ChatRequest, ImagePart, ImageUrl, Pruning, ignored_keys
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import data_url_bytes, load_image, resize
from hawk_trt.request import EQUAL_HEADS, SCORED, ModelInputs, PruningConfig, Request, SamplingConfig
from hawk_trt.runtime.sampling import SMALLEST_TOP_P

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

_LOW_DETAIL_PX = 512
_SEEDS = 2**64  # the protocol allows negative ones

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that the batcher can answer.

    Attributes:
        requests: for the batcher, one a choice; the prompt of each is inputs.
        inputs: the prompt as tensors.
        sizes: width and height of its images.
        stream: whether the answer is sent while it grows.
        include_usage: whether a streamed answer ends with its usage.
        details: whether the answer tells of its making.
        ignored: places of keys that the server does not know.
    """

    requests: tuple[Request, ...]
    inputs: ModelInputs
    sizes: tuple[tuple[int, int], ...]
    stream: bool
    include_usage: bool
    details: bool
    ignored: tuple[str, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, before pruning."""
        return int(np.asarray(self.inputs.input_ids).size)


def images_of(chat: ChatRequest, settings: ServeSettings) -> dict[str, ImageUrl]:
    """The images of a chat in order, by their places in it: messages[0].content[1].image_url.

    Raises:
        ApiError: a combination of fields or a number of them that the server does not take.
    """
    if chat.stream_options is not None and not chat.stream:
        raise invalid('stream_options: only with "stream": true', "stream_options")
    if chat.max_tokens is not None and chat.max_completion_tokens not in (None, chat.max_tokens):
        raise invalid("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    if chat.top_logprobs and not chat.logprobs:
        raise invalid('top_logprobs: only with "logprobs": true', "top_logprobs")
    most = min(settings.max_choices, settings.max_open)
    if chat.n is not None and chat.n > most:
        raise invalid(f"n: got {chat.n}, expected at most {most}", "n")
    if len(chat.messages) > settings.max_messages:
        count = f"got {len(chat.messages)}, expected at most {settings.max_messages}"
        raise invalid(f"messages: {count}", "messages", "too_many_messages")
    images = {}
    for index, message in enumerate(chat.messages):
        for number, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                place = f"messages[{index}].content[{number}].image_url"
                if message.role != "user":
                    raise invalid(f"{place}: only a user's message has images, this one is {message.role}'s", place)
                images[place] = part.image_url
    if len(images) > settings.max_images:
        count = f"got {len(images)} images, expected at most {settings.max_images}"
        raise invalid(f"messages: {count}", "messages", "too_many_images")
    return images


def is_remote(image: ImageUrl) -> bool:
    """Whether an image has to be fetched."""
    return image.url[:5].lower() != "data:"


def prepare(
    pipe: "Pipeline",
    settings: ServeSettings,
    default: SamplingConfig,
    chat: ChatRequest,
    images: Mapping[str, ImageUrl],
    fetched: Mapping[str, bytes],
) -> Prepared:
    """Make the request of a chat.

    Args:
        pipe: that will answer.
        settings: of the server.
        default: how tokens are drawn where the chat does not say.
        chat: the request.
        images: of the chat, by their places.
        fetched: the bytes of the remote ones, by their places.

    Raises:
        ApiError: an image, prompt or option that cannot be used.
    """
    limit = min(chat.max_completion_tokens or chat.max_tokens or settings.max_tokens, settings.max_tokens)
    pruning = _pruning(settings.pruning, chat.pruning)
    sampling = _sampling(default, chat, pipe.bundle.manifest.language.vocab_size)
    pictures = _decoded(images, fetched, settings.max_image_pixels)
    rest = iter(pictures)
    try:
        inputs = pipe.prepare([_message(message, rest) for message in chat.messages], max_pixels=settings.max_pixels)
    except InvalidInput as error:
        raise invalid(str(error), "messages", "invalid_prompt") from error
    request = Request(
        inputs,
        pruning=pruning,
        max_new_tokens=limit,
        sampling=sampling,
        stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
        logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
        skip_special_tokens=chat.skip_special_tokens is not False,
    )
    # each choice has a seed of its own, the first one that of the request
    seeds = [None if chat.seed is None else (chat.seed + choice) % _SEEDS for choice in range(chat.n or 1)]
    prepared = Prepared(
        requests=tuple(replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds),
        inputs=inputs,
        sizes=tuple((picture.shape[1], picture.shape[0]) for picture in pictures),
        stream=bool(chat.stream),
        include_usage=chat.stream_options is not None and bool(chat.stream_options.include_usage),
        details=chat.hawk is not None and bool(chat.hawk.details),
        ignored=tuple(ignored_keys(chat)),
    )
    most = settings.max_prompt_tokens
    if most is not None and prepared.prompt_tokens > most:
        message = f"messages: got a prompt of {prepared.prompt_tokens} tokens, expected at most {most}"
        raise invalid(message, "messages", "context_length_exceeded")
    return prepared


def _decoded(images: Mapping[str, ImageUrl], fetched: Mapping[str, bytes], max_pixels: int) -> list[Picture]:
    """All images, uint8 [height, width, 3] each; one of more than its share of max_pixels is shrunk."""
    share = max_pixels // max(len(images), 1)
    decoded = []
    for place, image in images.items():
        try:
            content = fetched[place] if is_remote(image) else data_url_bytes(image.url)
            if not content:
                raise InvalidInput("image (bytes): got none")
            picture = load_image(content, max_pixels=share)
        except InvalidInput as error:
            reason = str(error).partition(": ")[2]
            raise invalid(f"{place}: {reason}", place, "invalid_image") from error
        height, width = picture.shape[:2]
        if image.detail == "low" and max(height, width) > _LOW_DETAIL_PX:
            scale = _LOW_DETAIL_PX / max(height, width)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            picture = np.asarray(resize(picture, *size, Image.Resampling.BICUBIC))
        decoded.append(picture)
    return decoded


def _message(message: ChatMessage, pictures: Iterator[Picture]) -> dict[str, Any]:
    """A message as Pipeline.prepare takes it, with the next decoded images in their places."""
    content: str | list[dict[str, Any]] = (
        message.content
        if isinstance(message.content, str)
        else [
            {"type": "image", "image": next(pictures)}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in message.content
        ]
    )
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _sampling(default: SamplingConfig, chat: ChatRequest, vocab_size: int) -> SamplingConfig:
    """How the request says that tokens are drawn; the server's default for the rest."""
    names = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(chat, name)) is not None}
    if chat.top_p is not None:
        given["top_p"] = max(chat.top_p, SMALLEST_TOP_P)
    if chat.top_k is not None:
        given["top_k"] = max(chat.top_k, 0)
    highest = max(chat.logit_bias or (), default=0)
    if highest >= vocab_size:
        raise invalid(f"logit_bias: got token {highest}, expected one below {vocab_size}", "logit_bias")
    return replace(default, **given)


def _pruning(default: PruningConfig, asked: Pruning | None) -> PruningConfig:
    """What the request asks for; the server's own setting for the rest."""
    if asked is None:
        return default
    given = asked.model_dump(exclude_none=True)
    selector = given.get("selector", default.selector)
    # keep_mass, diversity and head weights that the server has for its own selector do not go with every other
    base = default if selector in SCORED else replace(default, keep_mass=None, diversity=0.0)
    if selector in EQUAL_HEADS:
        base = replace(base, head_weights=None)
    try:
        return replace(base, **given)
    except InvalidInput as error:
        raise invalid(f"pruning.{error}", f"pruning.{str(error).partition(':')[0]}") from error
