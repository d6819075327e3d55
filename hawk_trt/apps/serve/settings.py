"""What a server allows and how long it waits: every limit, with its default and what it is for."""

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias

from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.request import PruningConfig, SamplingConfig
from hawk_trt.runtime.generation_config import checkpoint_sampling

KEY_VARIABLE = "HAWK_API_KEY"
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]
LOOPBACK_HOSTS = ("localhost", "*.localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """Every limit is an option of `hawk-trt serve`, and this text its help.

    Attributes:
        temperature: for requests without one; 0 is greedy (default: the generation config's, else 1)
        generation_config: model takes defaults of sampling from the checkpoint's generation_config.json, none does not
        max_batch: requests that share a decode step
        max_queue: requests that may wait; one more is answered 429
        max_cache_mb: megabytes for the KV caches of all running requests; by default a quarter of the memory here
        max_waiting_mb: megabytes for the bodies and image tensors of all requests together
        max_body_mb: largest request, and largest fetched image or video, in megabytes
        max_messages: most messages of a request
        max_images: most images and videos of a request
        max_frames: most frames of all videos of a request together; a longer one is sampled more thinly
        max_image_pixels: most pixels of all images of a request together, as sent, and of the frames that a model sees
        max_pixels: shrink larger images to so many pixels (default: the checkpoint's)
        prepare_seconds: processor time to decode videos and images and to tokenise the text of a large request
        prepare_mb: megabytes of memory for the same
        max_prompt_tokens: longest prompt, in tokens (default: the model's context)
        max_model_len: longest prompt and answer together, in tokens (default: the model's context)
        max_tokens: longest answer, in tokens, and the length for requests without a limit
        max_choices: most answers to a request (n)
        max_connections: open connections; one more is answered 503
        body_seconds: time to receive a request
        remote_seconds: time to fetch an image or video
        first_token_seconds: time until an answer begins, waiting in the queue included
        request_seconds: time until an answer is complete
        drain_seconds: time to finish answers after SIGTERM
        preprocess_threads: threads that prepare small requests, and as many processes for others
        log_level: least severe messages that are logged
    """

    temperature: float | None = None
    generation_config: Literal["model", "none"] = "model"
    max_batch: int = 8
    max_queue: int = 64
    max_cache_mb: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4e6
    max_waiting_mb: float = 1024
    max_body_mb: float = 20
    max_messages: int = 256
    max_images: int = 16
    max_frames: int = 256
    max_image_pixels: int = 33_554_432
    max_pixels: int | None = None
    prepare_seconds: float = 10.0
    prepare_mb: float = 4096
    max_prompt_tokens: int | None = None
    max_model_len: int | None = None
    max_tokens: int = 1024
    max_choices: int = 8
    max_connections: int = 512
    body_seconds: float = 30.0
    remote_seconds: float = 10.0
    first_token_seconds: float = 60.0
    request_seconds: float = 300.0
    drain_seconds: float = 30.0
    preprocess_threads: int = 2
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        for entry in fields(ServeLimits):
            value = getattr(self, entry.name)
            if value is None or entry.name in ("temperature", "generation_config", "log_level"):
                continue
            least = 1 if entry.type in (int, int | None) else 0.001
            if not least <= value < float("inf"):
                raise InvalidInput(f"{entry.name}: got {value!r}, expected a number of at least {least}")
        if self.temperature is not None and not 0.0 <= self.temperature <= 2.0:
            raise InvalidInput(f"temperature: got {self.temperature!r}, expected a number in [0, 2]")

    @property
    def max_body_bytes(self) -> int:
        """max_body_mb in bytes."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def max_open(self) -> int:
        """Answers that are read, prepared, waiting or running at a time; a request for several counts as many."""
        return self.max_batch + self.max_queue

    def sampling(self, bundle: Bundle) -> SamplingConfig:
        """How the tokens of a request are drawn that says nothing of it."""
        sampling = SamplingConfig(temperature=1.0)
        if self.generation_config == "model":
            sampling = checkpoint_sampling(bundle, served=True)
        return sampling if self.temperature is None else replace(sampling, temperature=self.temperature)


@dataclass(frozen=True, slots=True)
class ServeSettings(ServeLimits):
    """The settings of one server; InvalidInput where one is below what any server could work with."""

    model_name: str  # what clients call the model
    pruning: PruningConfig = field(default_factory=PruningConfig)  # of a request that says nothing of it
    remote_hosts: tuple[str, ...] = ()  # images and videos are fetched from NAME, *.NAME, or NAME:PORT if it is unusual
    cors_origins: tuple[str, ...] = ()  # web origins whose pages may call the server
    # Names that a request's Host may have: NAME, *.NAME for all below it, or * for any; requests of pages of others are
    # then refused too. None checks neither.
    allowed_hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any of these opens the server; none leaves it open
    page: bool = True  # whether / is a page to ask from

    def __post_init__(self) -> None:
        ServeLimits.__post_init__(self)
        if not self.model_name:
            raise InvalidInput("model_name: got an empty name, expected what clients shall call the model")
        if not all(key.isascii() for key in self.api_keys):
            raise InvalidInput("api_key: one has letters beyond ASCII, which clients cannot send")
        for name, form, expected in (
            ("allowed_hosts", r"[^/:]+|[^/]*:[^/]*:[^/]*|\[.*\]", "NAME or *.NAME, without port"),
            ("remote_hosts", r"[^/]+", "NAME, *.NAME or NAME:PORT"),
            (
                "cors_origins",
                r"\*|null|[a-z+.-]+://[^/A-Z]+",
                "https://NAME as browsers send it, no / at its end; or *",
            ),
        ):
            never = [value for value in getattr(self, name) if not re.fullmatch(form, value)]  # that any request has
            if never:
                raise InvalidInput(f"{name}: got {never[0]!r:.100}, expected {expected}")


def read_api_keys(file: Path | None, given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The keys that were given, and those of a file, one a line; without either the one in HAWK_API_KEY, or none."""
    given = tuple(key.strip() for key in given)
    if not all(given):
        raise InvalidInput("api_key: got an empty key, expected what clients send as Authorization: Bearer KEY")
    if file is None and given:
        return given
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file}: not UTF-8 text, expected keys, one a line") from error
    if not keys:
        raise InvalidInput(f"{file}: holds no key, expected one a line")
    return given + keys
