"""The body of a request becomes a request for the batcher: read, checked, its images decoded, its text tokenised.

What comes in is a stranger's: only data URLs and allowed addresses name images, only common formats are opened, and
the sizes of all images together are bounded before any of them is decoded. A body that is soon prepared is prepared in
a thread. Any other goes to a worker process, whose time and memory are bounded, and which is killed when the client
leaves.
"""

import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.apps.serve import protocol
from hawk_trt.apps.serve.errors import invalid
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import BASE64_STARTS, base64_bytes, data_url_bytes, decoding, load_image, resize
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from hawk_trt.request import EQUAL_HEADS, SCORED, ModelInputs, PruningConfig, Request, SamplingConfig
from hawk_trt.runtime.generation_config import SMALLEST_TOP_P

_LOW_DETAIL_PX = 512
_SEEDS = 2**64  # the protocol allows negative ones

# What a thread prepares: less than half a second of one core.
_SMALL_BODY_BYTES = 4_000_000
_SMALL_BODY_COMMAS = 10_000  # each entry of JSON takes its time, as small as it may be
_SMALL_TEXT_CHARACTERS = 65_536
_SMALL_PIXELS = 8_000_000
_SMALL_SCANNED_PIXELS = 40_000_000  # a JPEG of several scans goes over its pixels as often
_SMALL_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_SCAN = b"\xff\xda"

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that the batcher can answer."""

    request: Request  # for the batcher, its prompt as ModelInputs
    sizes: tuple[tuple[int, int], ...]  # width and height of its images
    ignored: tuple[str, ...]  # places of keys that the server does not know
    chat: protocol.ChatRequest  # what the client sent, but for the messages

    @property
    def choices(self) -> int:
        """Answers that it asks for."""
        return self.chat.n or 1

    @property
    def inputs(self) -> ModelInputs:
        """The prompt."""
        assert isinstance(self.request.prompt, ModelInputs)
        return self.request.prompt

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, before pruning."""
        return int(np.asarray(self.inputs.input_ids).size)

    def requests(self) -> list[Request]:
        """One for each choice: the first has the seed of the request, and every other one its own."""
        first = self.chat.seed
        seeds = [None if first is None else (first + choice) % _SEEDS for choice in range(self.choices)]
        sampling = self.request.sampling or SamplingConfig()
        return [replace(self.request, sampling=replace(sampling, seed=seed)) for seed in seeds]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How bodies become requests; sampling is for those that say nothing of it."""

    bundle: Bundle
    settings: ServeSettings
    sampling: SamplingConfig

    def prepare(
        self, processor: Processor, body: bytes, fetched: dict[str, bytes], *, small: bool
    ) -> Prepared | dict[str, str] | None:
        """Make the request of a body; None where it shall be small, and this would take long.

        Where images are not among the fetched ones, their addresses are returned in its place, by their places in the
        body, as in fetched.
        """
        if small and (len(body) > _SMALL_BODY_BYTES or body.count(b",") > _SMALL_BODY_COMMAS):
            return None
        settings = self.settings
        chat = protocol.read_request(body)
        protocol.check_model(chat.model, settings.model_name)
        images = _images_of(chat, settings)
        missing = {
            place: image.url
            for place, image in images.items()
            if image.url[:5].lower() != "data:" and not image.url.startswith(BASE64_STARTS)
        }
        if missing.keys() - fetched.keys():
            return missing
        contents = fetched | {
            place: _content(place, image.url) for place, image in images.items() if place not in missing
        }
        if small and not _is_small(chat, list(contents.values())):
            return None
        limit = min(chat.max_completion_tokens or chat.max_tokens or settings.max_tokens, settings.max_tokens)
        pruning = _pruning(settings.pruning, chat.pruning)
        sampling = _sampling(self.sampling, chat, self.bundle.manifest.language.vocab_size)
        pictures = _decoded(images, contents, settings.max_image_pixels)
        rest = iter(pictures)
        messages = [_message(message, rest) for message in chat.messages]
        try:
            inputs = processor(Request(messages, max_pixels=settings.max_pixels))
        except InvalidInput as error:
            raise invalid(str(error), "messages", "invalid_prompt") from error
        prepared = Prepared(
            request=Request(
                inputs,
                pruning=pruning,
                sampling=sampling,
                stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
                logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
                skip_special_tokens=chat.skip_special_tokens is not False,
            ),
            sizes=tuple((picture.shape[1], picture.shape[0]) for picture in pictures),
            ignored=tuple(protocol.ignored_keys(chat)),
            chat=chat.model_copy(update={"messages": []}),
        )
        length, most = prepared.prompt_tokens, settings.max_prompt_tokens
        if settings.max_model_len is not None:
            most = min(most or settings.max_model_len, settings.max_model_len - 1)
            limit = min(limit, settings.max_model_len - length)
        if most is not None and length > most:
            message = f"messages: got a prompt of {length} tokens, expected at most {most}"
            raise invalid(message, "messages", "context_length_exceeded")
        return replace(prepared, request=replace(prepared.request, max_new_tokens=limit))

    def in_worker(self, body: bytes, fetched: dict[str, bytes]) -> Prepared | dict[str, str]:
        """The same in a worker process, within limits."""
        _limit(self.settings.prepare_seconds, self.settings.prepare_mb)
        try:
            if not _PROCESSORS:
                family = load_family(self.bundle.manifest.vision)
                _PROCESSORS.append(Processor(self.bundle, family))
            prepared = self.prepare(_PROCESSORS[0], body, fetched, small=False)
            assert prepared is not None
            return prepared
        except MemoryError:
            raise too_much() from None


_PROCESSORS: list[Processor] = []  # that of this worker process


def too_much() -> Exception:
    """A request whose preparation took more than it may."""
    message = "messages: the images and the text take more time or memory than one request may. Send less, or smaller"
    return invalid(message, "messages", "too_much_work")


def _limit(seconds: float, megabytes: float) -> None:
    """Bound what this process takes from now on. The system kills it when its time is over."""
    used = math.ceil(sum(os.times()[:2]) + seconds)
    for kind, most in ((resource.RLIMIT_CPU, used), (resource.RLIMIT_AS, int(megabytes * 1e6))):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _content(place: str, url: str) -> bytes:
    """The file that a data URL, or base64 without its head, holds."""
    try:
        return base64_bytes(url) if url.startswith(BASE64_STARTS) else data_url_bytes(url)
    except InvalidInput as error:
        raise _of_image(place, error) from error


def _of_image(place: str, error: InvalidInput) -> Exception:
    return invalid(f"{place}: {str(error).partition(': ')[2]}", place, "invalid_image")


def _is_small(chat: protocol.ChatRequest, contents: list[bytes]) -> bool:
    """Whether the text is short and the headers of files say that they are soon decoded; unusual files are not."""
    parts = [part for message in chat.messages for part in message.parts]
    if sum(len(part.text) for part in parts if isinstance(part, protocol.TextPart)) > _SMALL_TEXT_CHARACTERS:
        return False
    pixels = scanned = 0
    try:
        for content in contents:
            with decoding("image"), Image.open(BytesIO(content), formats=_SMALL_FORMATS) as image:
                pixels += image.width * image.height
                scans = content.count(_JPEG_SCAN) if image.format == "JPEG" else 1
                scanned += image.width * image.height * scans
    except InvalidInput:
        return False
    return sum(map(len, contents)) <= _SMALL_BODY_BYTES and pixels <= _SMALL_PIXELS and scanned <= _SMALL_SCANNED_PIXELS


def _images_of(chat: protocol.ChatRequest, settings: ServeSettings) -> dict[str, protocol.ImageUrl]:
    """The images of a chat in order, by their places in it: messages[0].content[1].image_url.

    Refuses a combination of fields, or a number of them, that the server does not take.
    """
    if chat.max_tokens is not None and chat.max_completion_tokens not in (None, chat.max_tokens):
        raise invalid("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    if chat.top_logprobs and not chat.logprobs:
        raise invalid('top_logprobs: only with "logprobs": true', "top_logprobs")
    for name in (chat.model_extra or {}).keys() & protocol.Pruning.model_fields.keys():
        raise invalid(f'{name}: it belongs into pruning, as {{"pruning": {{"{name}": ...}}}}', name)
    most = min(settings.max_choices, settings.max_open)
    if chat.n is not None and chat.n > most:
        raise invalid(f"n: got {chat.n}, expected at most {most}", "n")
    if len(chat.messages) > settings.max_messages:
        count = f"got {len(chat.messages)}, expected at most {settings.max_messages}"
        raise invalid(f"messages: {count}", "messages", "too_many_messages")
    images = {}
    for index, message in enumerate(chat.messages):
        for number, part in enumerate(message.parts):
            if isinstance(part, protocol.ImagePart):
                place = f"messages[{index}].content[{number}].image_url"
                if message.role != "user":
                    raise invalid(f"{place}: only a user's message has images, this one is {message.role}'s", place)
                images[place] = part.image_url
    if len(images) > settings.max_images:
        count = f"got {len(images)} images, expected at most {settings.max_images}"
        raise invalid(f"messages: {count}", "messages", "too_many_images")
    return images


def _decoded(images: Mapping[str, protocol.ImageUrl], contents: Mapping[str, bytes], max_pixels: int) -> list[Picture]:
    """All images, uint8 [height, width, 3] each; one of more than its share of max_pixels is shrunk."""
    share = max_pixels // max(len(images), 1)
    decoded = []
    for place, image in images.items():
        try:
            if not contents[place]:
                raise InvalidInput("image (bytes): got none")
            picture = load_image(contents[place], max_pixels=share)
        except InvalidInput as error:
            raise _of_image(place, error) from error
        height, width = picture.shape[:2]
        if image.detail == "low" and max(height, width) > _LOW_DETAIL_PX:
            scale = _LOW_DETAIL_PX / max(height, width)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            picture = np.asarray(resize(picture, *size, Image.Resampling.BICUBIC))
        decoded.append(picture)
    return decoded


def _message(message: protocol.ChatMessage, pictures: Iterator[Picture]) -> dict[str, Any]:
    """A message as the processor takes it, with the next decoded images in their places."""
    content: str | list[dict[str, Any]] = (
        message.content
        if isinstance(message.content, str)  # which a template may treat unlike a list of one text
        else [
            {"type": "text", "text": part.text}
            if isinstance(part, protocol.TextPart)
            else {"type": "image", "image": next(pictures)}
            for part in message.content
        ]
    )
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _sampling(default: SamplingConfig, chat: protocol.ChatRequest, vocab_size: int) -> SamplingConfig:
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


def _pruning(default: PruningConfig, asked: protocol.Pruning | None) -> PruningConfig:
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
