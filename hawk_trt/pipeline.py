"""Pipeline: a bundle, loaded; prompts in, answers out.

prepare   prompt, images, videos      -> ModelInputs                      inputs/
layout    ModelInputs                 -> PromptLayout                     inputs/
encode    pixel values                -> visual embeddings                runtime/, vision stage
prefill   first_layer, decoder        -> kept indices, scores, the first token
decode    one token a row at a time   -> until a stop token, a stop string or max_new_tokens
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hawk_trt.bundle import Bundle, holds_engines
from hawk_trt.errors import BackendError, BundleError, InvalidInput
from hawk_trt.inputs.layout import PromptLayout
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from hawk_trt.request import ModelInputs, PruningConfig, Request, Result, SamplingConfig
from hawk_trt.runtime.protocol import Backend
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB, VisionCache
from hawk_trt.scheduler import DEFAULT_MAX_NEW_TOKENS, Scheduler
from hawk_trt.sequence import Sequence as Answer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from hawk_trt.inputs.turns import JsonObject
    from hawk_trt.request import ImageInput, Message, VideoInput

_THREADS = 256  # of more, ONNX Runtime makes them all before it notices, for minutes


class Pipeline:
    """A loaded model. Make it with `Pipeline.load`; close it, or use it as a context manager."""

    def __init__(self, bundle: Bundle, backend: Backend, vision_cache_mb: float = DEFAULT_VISION_CACHE_MB) -> None:
        self.bundle = bundle
        self.backend = backend
        self._closed = False
        self.family = load_family(bundle.manifest.vision)
        self.processor = Processor(bundle, self.family)
        self.vision_cache = VisionCache(backend, self.family, vision_cache_mb)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | None = None,
        target: str | None = None,
        *,
        verify: bool = False,
        vision_cache_mb: float = DEFAULT_VISION_CACHE_MB,
        threads: int | None = None,
    ) -> "Pipeline":
        """Load a bundle, or the engines made from one.

        Args:
            path: a bundle's folder, or an engine folder.
            device: "cpu", "cuda" or "cuda:N"; None is "cpu" for a bundle and "cuda" for engines.
            target: of the graphs: "cpu", "cuda" or "portable"; None takes the best for the device and version.
            verify: also hash the weight files, which takes as long as reading them.
            vision_cache_mb: megabytes of visual embeddings to keep, so that another question about an image or video
                does not run the vision stage again; 0 keeps none. The default, 256, is 27 images of 1,296 tokens of
                the 7B in bfloat16. Videos of more than 16,384 patches are not kept. On a GPU that ONNX Runtime
                runs they stay there; TensorRT's are kept on the host.
            threads: of the CPU, for each stage in ONNX Runtime; None takes one a core.

        Raises:
            InvalidInput: vision_cache_mb is not a number of megabytes, or threads not one of threads.
            BundleError: nothing to load there, damaged files, or none of the target or for this machine.
            BackendError: a device that cannot be used here, or a runtime that is not installed.
        """
        if not isinstance(path, str | os.PathLike):
            raise InvalidInput(f"path: got {type(path).__name__}, expected the folder of a bundle or of engines")
        folder, most = Path(path), max(_THREADS, os.cpu_count() or 1)
        if device is not None and not isinstance(device, str):
            raise InvalidInput(f'device: got {device!r}, expected "cpu", "cuda" or "cuda:N"')
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most
        ):
            raise InvalidInput(f"threads: got {threads!r}, expected an integer from 1 to {most}, at best one a core")
        try:
            engines_there = holds_engines(folder)
        except OSError as error:
            raise BundleError(f"{str(folder)[:200]}: cannot be read ({error.strerror})") from error
        if engines_there:
            from hawk_trt.engine_folder import EngineFolder

            engines = EngineFolder.load(folder, verify=verify)
            if threads is not None:
                raise InvalidInput(f"threads: got {threads}, which are ONNX Runtime's; leave them out with engines")
            try:
                from hawk_trt.runtime.tensorrt.backend import TensorRtBackend
            except ImportError as error:
                from hawk_trt.runtime.tensorrt import missing_for_tensorrt

                raise BackendError(missing_for_tensorrt(error)) from error
            return cls(engines.bundle, TensorRtBackend.load(engines, device or "cuda", target), vision_cache_mb)
        bundle = Bundle.load(folder, verify=verify)
        try:
            from hawk_trt.runtime.onnxruntime import OnnxRuntimeBackend
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise BackendError(
                "onnxruntime: not installed. pip install onnxruntime, or onnxruntime-gpu for a GPU"
            ) from error
        return cls(bundle, OnnxRuntimeBackend.load(bundle, device or "cpu", target, threads), vision_cache_mb)

    def close(self) -> None:
        """Release the model."""
        self._closed = True
        self.vision_cache.clear()
        self.backend.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(
        self,
        prompt: "str | Sequence[Message] | ModelInputs",
        images: "Sequence[ImageInput]" = (),
        videos: "Sequence[VideoInput]" = (),
        *,
        tools: "Sequence[JsonObject]" = (),
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> ModelInputs:
        """Turn a prompt into tensors, in the layout of the checkpoint's own processor; generate takes these too.

        The arguments are those of Request. Raises InvalidInput: a prompt, image or video that cannot be used, or tools
        that the template does not take.
        """
        request = Request(prompt, images, videos, tools=tools, min_pixels=min_pixels, max_pixels=max_pixels)
        return self.processor(request)

    def layout(self, inputs: ModelInputs, query: str | None = None) -> PromptLayout:
        """Where everything of a prompt lies: its visual tokens, its question, its positions; as Processor.layout."""
        return self.processor.layout(inputs, query)

    def chat_tokenizer(self) -> "Tokenizer | None":
        """The checkpoint's tokenizer, of the tokenizers package; None where the bundle has none."""
        return None if self.processor.chat is None else self.processor.chat.tokenizer

    def generate(
        self,
        prompt: "str | Sequence[Message] | ModelInputs",
        images: "Sequence[ImageInput]" = (),
        videos: "Sequence[VideoInput]" = (),
        pruning: PruningConfig | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        logprobs: int | None = None,
        skip_special_tokens: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Result:
        """Answer one prompt. The arguments are those of Request, whose docstring describes each.

        Raises InvalidInput: something that cannot be used as given; BackendError: the runtime failed.
        """
        request = Request(
            prompt, images, videos, pruning, max_new_tokens, sampling, stop, ignore_eos, return_logits,
            logprobs, skip_special_tokens, min_pixels=min_pixels, max_pixels=max_pixels,
        )  # fmt: skip
        scheduler = self.scheduler()
        return _answers(scheduler, [scheduler.add(request)])[0]

    def stream(
        self,
        prompt: "str | Sequence[Message] | ModelInputs",
        images: "Sequence[ImageInput]" = (),
        videos: "Sequence[VideoInput]" = (),
        pruning: PruningConfig | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        logprobs: int | None = None,
        skip_special_tokens: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "TextStream":
        """As generate, but the answer's text comes in pieces: iterate, then read `.result`."""
        request = Request(
            prompt, images, videos, pruning, max_new_tokens, sampling, stop, ignore_eos, return_logits,
            logprobs, skip_special_tokens, min_pixels=min_pixels, max_pixels=max_pixels,
        )  # fmt: skip
        scheduler = self.scheduler()
        return TextStream(self, scheduler, scheduler.add(request))

    def generate_batch(
        self,
        requests: "Sequence[Request | str | Sequence[Message] | ModelInputs]",
        pruning: PruningConfig | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        logprobs: int | None = None,
        skip_special_tokens: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> list[Result]:
        """Answer several prompts side by side; each result equals the one that generate gives alone.

        What a Request does not say for itself, the other arguments say for all. Raises InvalidInput: something that
        cannot be used as given, with the number of the request; BackendError: the runtime failed.
        """
        options = Request(
            "", (), (), pruning, max_new_tokens, sampling, stop, ignore_eos, return_logits,
            logprobs, skip_special_tokens, min_pixels=min_pixels, max_pixels=max_pixels,
        )  # fmt: skip
        if isinstance(requests, str | bytes) or not isinstance(requests, Sequence):
            got = type(requests).__name__
            raise InvalidInput(f"requests: got {got}, expected a list of prompts; one prompt alone: generate")
        scheduler = self.scheduler()
        sequences = []
        for number, entry in enumerate(requests):
            request = entry if isinstance(entry, Request) else Request(entry)
            try:
                sequences.append(scheduler.add(request.with_defaults(options)))
            except InvalidInput as error:
                raise InvalidInput(f"requests[{number}]: {error}") from error
        return _answers(scheduler, sequences)

    def check_open(self) -> None:
        """Raise BackendError where it is closed."""
        if self._closed:
            raise BackendError("pipeline: it is closed. Load the model again: Pipeline.load")

    def scheduler(self) -> Scheduler:
        """A new scheduler of this model; BackendError where it is closed."""
        self.check_open()
        return Scheduler(self.bundle, self.processor, self.vision_cache, self.backend)


class TextStream:
    """The text of one answer, piece by piece; `.result` after the last."""

    def __init__(self, pipe: Pipeline, scheduler: Scheduler, sequence: Answer) -> None:
        self._pipe = pipe
        self._scheduler = scheduler
        self._sequence = sequence

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next piece that is not empty."""
        while not self._sequence.finished:
            self._pipe.check_open()
            _check(self._scheduler.step())
            if self._sequence.piece:
                return self._sequence.piece
        raise StopIteration

    @property
    def result(self) -> Result:
        """The whole result; what is left of the answer is generated first."""
        for _ in self:
            pass
        _check([self._sequence])
        return self._sequence.result()


def _answers(scheduler: Scheduler, sequences: Sequence[Answer]) -> list[Result]:
    """Step until all are finished."""
    while not all(sequence.finished for sequence in sequences):
        _check(scheduler.step())
    return [sequence.result() for sequence in sequences]


def _check(moved: Sequence[Answer]) -> None:
    """Raise what ended one of these sequences."""
    for sequence in moved:
        if sequence.error is not None:
            raise sequence.error
