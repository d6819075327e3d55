"""A request becomes a job: images decoded, the prompt made, pruning and sampling settled. Runs in a thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hawk_trt.apps.serve.conversation import ImageSource, pictures, pipeline_messages
from hawk_trt.apps.serve.job import Job
from hawk_trt.apps.serve.protocol import ChatRequest, Pruning
from hawk_trt.apps.serve.refusal import invalid
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.selectors import EQUAL_HEADS, SCORED
from hawk_trt.request import PruningConfig, SamplingConfig

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

_SMALLEST_TOP_P = 1e-9  # the protocol allows 0, which is the most probable token as well
_SEEDS = 2**64  # the protocol allows negative ones


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to run.

    Attributes:
        job: for the batcher.
        sizes: width and height of its images.
        stream: whether the answer is sent while it grows.
        include_usage: whether a streamed answer tells its usage.
        details: whether the answer tells of its making.
    """

    job: Job
    sizes: tuple[tuple[int, int], ...]
    stream: bool
    include_usage: bool
    details: bool

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, before pruning."""
        return int(np.asarray(self.job.inputs.input_ids).size)

    @property
    def tensor_bytes(self) -> int:
        """That the job holds."""
        pixel_values = self.job.inputs.pixel_values
        return 0 if pixel_values is None else pixel_values.nbytes


def prepare(
    pipe: "Pipeline",
    settings: ServeSettings,
    request: ChatRequest,
    sources: Sequence[ImageSource],
    fetched: Mapping[str, bytes],
    deadline: float,
) -> Prepared:
    """Make the job of a request.

    Args:
        pipe: that will answer.
        settings: of the server.
        request: checked by itself.
        sources: its images.
        fetched: the bytes of the remote ones, by their place.
        deadline: on the clock of time.monotonic(), in seconds.

    Raises:
        Refusal: an image, prompt or option that cannot be used.
    """
    limit = request.max_completion_tokens or request.max_tokens or settings.max_tokens
    if limit > settings.max_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise invalid(f"{name}: got {limit}, expected at most {settings.max_tokens}", name)
    pruning = _pruning(settings.pruning, request.pruning)
    images = pictures(sources, fetched, settings)
    try:
        inputs = pipe.prepare(pipeline_messages(request.messages, images), max_pixels=settings.max_pixels)
    except InvalidInput as error:
        raise invalid(str(error), "messages", "invalid_prompt") from error
    job = Job(
        inputs=inputs,
        pruning=pruning,
        max_new_tokens=limit,
        sampling=SamplingConfig(
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else max(request.top_p, _SMALLEST_TOP_P),
            seed=None if request.seed is None else request.seed % _SEEDS,
        ),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        deadline=deadline,
    )
    options = request.stream_options
    prepared = Prepared(
        job=job,
        sizes=tuple((image.shape[1], image.shape[0]) for image in images),
        stream=bool(request.stream),
        include_usage=options is not None and bool(options.include_usage),
        details=request.hawk is not None and request.hawk.details,
    )
    most = settings.max_prompt_tokens
    if most is not None and prepared.prompt_tokens > most:
        message = f"messages: got a prompt of {prepared.prompt_tokens} tokens, expected at most {most}"
        raise invalid(message, "messages", "context_length_exceeded")
    return prepared


def _pruning(default: PruningConfig, asked: Pruning | None) -> PruningConfig:
    """What the request asks for, over what the server was told."""
    if asked is None:
        return default
    given = {field: value for field in asked.__struct_fields__ if (value := getattr(asked, field)) is not None}
    selector = given.get("selector", default.selector)
    # what the server was told for its own selector does not go with every other
    base = default if selector in SCORED else replace(default, keep_mass=None, diversity=0.0)
    if selector in EQUAL_HEADS:
        base = replace(base, head_weights=None)
    try:
        return replace(base, **given)
    except InvalidInput as error:
        raise invalid(f"pruning.{error}", f"pruning.{str(error).partition(':')[0]}") from error
