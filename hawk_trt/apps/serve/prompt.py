"""The body of a request becomes a request for the batcher: read, checked, its images decoded, its text tokenised.

What comes in is a stranger's: only data URLs and allowed addresses name images and videos, only common formats are
opened, and the sizes of all images together are bounded before any of them is decoded. A body that is soon prepared is
prepared in a thread. Any other, and each with a video, goes to a worker process, whose time and memory are bounded, and
which is killed when the client leaves.
"""

import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from hawk_trt.apps.serve import protocol
from hawk_trt.apps.serve.errors import invalid
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.bundle import Bundle
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs.images import BASE64_STARTS, base64_bytes, data_url_bytes, decoding, load_image, resize
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from hawk_trt.models.qwen_video import FRAME_MULTIPLE
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

Source: TypeAlias = protocol.ImageUrl | protocol.VideoUrl


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that the batcher can answer."""

    request: Request  # for the batcher, its prompt as ModelInputs
    sizes: tuple[tuple[int, int], ...]  # width and height of its images; none where it has videos too
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

    @property
    def pixel_bytes(self) -> int:
        """Of its images and videos."""
        pixels = self.inputs.pixel_values, self.inputs.pixel_values_videos
        return sum(np.asarray(values).nbytes for values in pixels if values is not None)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How bodies become requests; sampling is for those that say nothing of it."""

    bundle: Bundle
    settings: ServeSettings
    sampling: SamplingConfig

    def prepare(
        self, processor: Processor, body: bytes, fetched: dict[str, bytes], folder: Path | None = None
    ) -> Prepared | dict[str, str] | None:
        """Make the request of a body; None without a folder, which a thread has not, where this would take long.

        Where images or videos are not among the fetched ones, their addresses are returned in its place, by their
        places in the body, as in fetched. folder: for the files of videos.
        """
        if folder is None and (len(body) > _SMALL_BODY_BYTES or body.count(b",") > _SMALL_BODY_COMMAS):
            return None
        settings = self.settings
        chat = protocol.read_request(body)
        protocol.check_model(chat.model or settings.model_name, settings.model_name)
        sources = _sources_of(chat, settings)
        missing = {
            place: source.url
            for place, source in sources.items()
            if source.url[:5].lower() != "data:" and not source.url.startswith(BASE64_STARTS)
        }
        if missing.keys() - fetched.keys():
            return missing
        contents = fetched | {place: _content(place, one) for place, one in sources.items() if place not in missing}
        if folder is None and not _is_small(chat, sources, contents):
            return None
        limit = min(chat.max_completion_tokens or chat.max_tokens or settings.max_tokens, settings.max_tokens)
        pruning = _pruning(settings.pruning, chat.pruning)
        sampling = _sampling(self.sampling, chat)
        items, files = self._items(sources, contents, folder, processor.sampling.max_frames or settings.max_frames)
        rest = iter(items)
        messages = [_message(message, rest) for message in chat.messages]
        try:
            inputs = processor(Request(messages, max_pixels=settings.max_pixels))
            if inputs.pixel_values_videos is not None:  # frames that are made when they are read are read now
                inputs = replace(inputs, pixel_values_videos=np.asarray(inputs.pixel_values_videos))
        except (InvalidInput, BackendError) as error:
            if isinstance(error, BackendError) and not files:  # of the server's inside, which no client sees
                raise
            raise _of_prompt(error, files) from error
        prepared = Prepared(
            request=Request(
                inputs,
                pruning=pruning,
                sampling=sampling,
                stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
                ignore_eos=bool(chat.ignore_eos),
                logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
                skip_special_tokens=chat.skip_special_tokens is not False,
            ),
            sizes=() if files else tuple(item["image"].shape[1::-1] for item in items),
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

    def _items(
        self, sources: Mapping[str, Source], contents: Mapping[str, bytes], folder: Path | None, max_frames: int
    ) -> tuple[list[dict[str, Any]], dict[str, Path]]:
        """Images and videos in order, as the processor takes them; and the files of the videos, by their places.

        max_frames: that the checkpoint takes of a video; the server's limit may be lower.
        """
        settings = self.settings
        items: list[dict[str, Any]] = []
        files: dict[str, Path] = {}
        share = settings.max_image_pixels // max(len(sources), 1)
        videos = sum(isinstance(source, protocol.VideoUrl) for source in sources.values())
        bounds = {"max_frames": max(FRAME_MULTIPLE, min(max_frames, settings.max_frames // max(videos, 1)))}
        if load_family(self.bundle.manifest.vision).pixel_bounds != "nothing":  # else all frames have one size
            bounds["total_pixels"] = share
        for place, source in sources.items():
            if isinstance(source, protocol.ImageUrl):
                items.append({"type": "image", "image": _decoded(place, source, contents[place], share)})
            else:
                assert folder is not None  # no request with a video is small
                files[place] = folder / f"video-{len(files)}"
                files[place].write_bytes(contents[place])
                items.append({"type": "video", "video": str(files[place]), **bounds})
        return items, files

    def in_worker(self, body: bytes, fetched: dict[str, bytes], folder: Path) -> Prepared | dict[str, str]:
        """The same in a worker process, within limits."""
        _limit(self.settings.prepare_seconds, self.settings.prepare_mb)
        try:
            if not _PROCESSORS:
                family = load_family(self.bundle.manifest.vision)
                _PROCESSORS.append(Processor(self.bundle, family))
            prepared = self.prepare(_PROCESSORS[0], body, fetched, folder)
            assert prepared is not None
            return prepared
        except MemoryError:
            raise too_much() from None


_PROCESSORS: list[Processor] = []  # that of this worker process


def too_much() -> Exception:
    """A request whose preparation took more than it may."""
    message = "messages: images, videos and text take more time or memory than one request may. Send less, or smaller"
    return invalid(message, "messages", "too_much_work")


def _limit(seconds: float, megabytes: float) -> None:
    """Bound what this process takes from now on. The system kills it when its time is over."""
    used = math.ceil(sum(os.times()[:2]) + seconds)
    for kind, most in ((resource.RLIMIT_CPU, used), (resource.RLIMIT_AS, int(megabytes * 1e6))):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _content(place: str, source: Source) -> bytes:
    """The file that a data URL, or base64 without its head, holds."""
    kind = "image" if isinstance(source, protocol.ImageUrl) else "video"
    try:
        return base64_bytes(source.url) if source.url.startswith(BASE64_STARTS) else data_url_bytes(source.url, kind)
    except InvalidInput as error:
        raise invalid(f"{place}: {str(error).partition(': ')[2]}", place, f"invalid_{kind}") from error


def _of_prompt(error: InvalidInput | BackendError, files: Mapping[str, Path]) -> Exception:
    """Why there is no prompt. An error of a video's file names its place in the body instead."""
    for place, file in files.items():
        if str(file) in str(error):
            return invalid(str(error).replace(str(file), place), place, "invalid_video")
    if isinstance(error, BackendError):
        return invalid(f"messages: this server takes no videos: {error}", "messages", "unsupported")
    if "the model's context" in str(error):  # clients that shorten a chat by themselves look for the code
        return invalid(str(error).partition(": --max-pixels")[0], "messages", "context_length_exceeded")
    return invalid(str(error), "messages", "invalid_prompt")


def _is_small(chat: protocol.ChatRequest, sources: Mapping[str, Source], files: Mapping[str, bytes]) -> bool:
    """Whether the text is short and the headers of images say that they are soon decoded; unusual files are not."""
    contents = list(files.values())
    if any(isinstance(source, protocol.VideoUrl) for source in sources.values()):
        return False
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


def _sources_of(chat: protocol.ChatRequest, settings: ServeSettings) -> dict[str, Source]:
    """The images and videos of a chat in order, by their places in it: messages[0].content[1].image_url.

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
    sources: dict[str, Source] = {}
    for index, message in enumerate(chat.messages):
        for number, part in enumerate(message.parts):
            if not isinstance(part, protocol.TextPart):
                place = f"messages[{index}].content[{number}].{part.field}"
                if message.role != "user":
                    raise invalid(
                        f"{place}: only a user's message has images and videos, this one is {message.role}'s", place
                    )
                sources[place] = part.source
    if len(sources) > settings.max_images:
        count = f"got {len(sources)} images and videos, expected at most {settings.max_images}"
        raise invalid(f"messages: {count}", "messages", "too_many_images")
    return sources


def _decoded(place: str, source: protocol.ImageUrl, content: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """An image, uint8 [height, width, 3]; one of more pixels is shrunk."""
    try:
        if not content:
            raise InvalidInput("image (bytes): got none")
        picture = load_image(content, max_pixels=max_pixels)
    except InvalidInput as error:
        raise invalid(f"{place}: {str(error).partition(': ')[2]}", place, "invalid_image") from error
    height, width = picture.shape[:2]
    if source.detail == "low" and max(height, width) > _LOW_DETAIL_PX:
        scale = _LOW_DETAIL_PX / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        picture = np.asarray(resize(picture, *size, Image.Resampling.BICUBIC))
    return picture


def _message(message: protocol.ChatMessage, items: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A message as the processor takes it, with the next decoded images and videos in their places."""
    content: str | list[dict[str, Any]] = (
        message.content
        if isinstance(message.content, str)  # which a template may treat unlike a list of one text
        else [
            {"type": "text", "text": part.text} if isinstance(part, protocol.TextPart) else next(items)
            for part in message.content
        ]
    )
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _sampling(default: SamplingConfig, chat: protocol.ChatRequest) -> SamplingConfig:
    """How the request says that tokens are drawn; the server's default for the rest."""
    names = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(chat, name)) is not None}
    if chat.top_p is not None:
        given["top_p"] = max(chat.top_p, SMALLEST_TOP_P)
    if chat.top_k is not None:
        given["top_k"] = max(chat.top_k, 0)
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
