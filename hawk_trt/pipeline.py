"""Pipeline: a bundle, loaded; prompts in, answers out.

prepare   prompt, images, videos      -> ModelInputs
layout    ModelInputs                 -> PromptLayout, one a row; collate -> PrefillInputs
encode    pixel values                -> visual embeddings
prefill   first_layer, decoder        -> kept indices, scores, the first token
decode    one token a row at a time   -> until a stop token, a stop string or max_new_tokens
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.inputs.layout import PromptLayout, prompt_layout
from hawk_trt.inputs.processor import Processor
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.family import Family, Patches
from hawk_trt.models.registry import family_by_name
from hawk_trt.request import ModelInputs, PruningConfig, Request, Result, SamplingConfig
from hawk_trt.row import Row
from hawk_trt.run import Run
from hawk_trt.runtime.protocol import Backend, Visual, backend_for, load_backend
from hawk_trt.runtime.vision_cache import DEFAULT_VISION_CACHE_MB, VisionCache, one_by_one

if TYPE_CHECKING:
    from hawk_trt.inputs.tools import JsonObject
    from hawk_trt.request import ImageInput, Message, VideoInput


@dataclass(frozen=True, slots=True)
class Trace:
    """Every stage's output for one prompt and given tokens, for comparison with a reference.

    Attributes:
        visual_embeds: float32 [num_visual, hidden], in prompt order.
        scores: float32 [num_visual].
        kept_indices: int64 [kept], in the prompt as given.
        hidden_states: float32 [kept, hidden], first_layer's output.
        logits: float32 [steps, vocab]; row 0 after the prompt, row i after forced token i.
    """

    visual_embeds: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    kept_indices: npt.NDArray[np.int64]
    hidden_states: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


class Pipeline:
    """A loaded model. Make it with `Pipeline.load`; close it, or use it as a context manager.

    Attributes:
        bundle: what it was loaded from.
        backend: what runs it.
        family: what its model asks of the host.
        vision_cache: embeddings of images and videos asked about before.
    """

    def __init__(self, bundle: Bundle, backend: Backend, vision_cache_mb: float = DEFAULT_VISION_CACHE_MB) -> None:
        self.vision_cache = VisionCache(backend, vision_cache_mb)
        self.bundle = bundle
        self.backend = backend
        self.family: Family = family_by_name(bundle.manifest.family)(bundle.manifest.vision)
        self._processor = Processor(bundle, self.family)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "onnxruntime",
        device: str | None = None,
        target: str | None = None,
        *,
        verify: bool = False,
        vision_cache_mb: float = DEFAULT_VISION_CACHE_MB,
        threads: int | None = None,
    ) -> "Pipeline":
        """Load a bundle, or the engines made from one.

        Args:
            path: a bundle's folder, or with TensorRT an engine folder.
            backend: "onnxruntime" or "tensorrt".
            device: "cpu", "cuda" or "cuda:N"; None is "cpu" in ONNX Runtime and "cuda" in TensorRT.
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
            BackendError: a backend or device that cannot be used here.
        """
        if backend == "tensorrt":
            engines = EngineFolder.load(path, verify=verify)
            return cls(engines.bundle, load_backend(engines, backend, device, target, threads), vision_cache_mb)
        if backend_for(path) == "tensorrt":
            raise BundleError(f'{path}: holds TensorRT engines. Load them with backend="tensorrt"')
        bundle = Bundle.load(path, verify=verify)
        return cls(bundle, load_backend(bundle, backend, device, target, threads), vision_cache_mb)

    def close(self) -> None:
        """Release the model."""
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

        Args:
            prompt: a string (images, then videos, come before it), chat messages, or tensors.
            images: paths, bytes, PIL images or uint8 arrays.
            videos: paths, lists of images, or uint8 arrays [frames, height, width, 3].
            tools: what the chat template tells the model that it may call, JSON objects.
            min_pixels: enlarge smaller images to this area.
            max_pixels: shrink larger images to this area.

        Raises:
            InvalidInput: a prompt, image or video that cannot be used, or tools that the template does not take.
        """
        if isinstance(prompt, ModelInputs):
            if len(images) or len(videos) or len(tools):
                raise InvalidInput(
                    "images, videos, tools: got some beside ModelInputs, which hold their own; leave them out"
                )
            return prompt
        return self._processor(prompt, images, videos, tools=tools, min_pixels=min_pixels, max_pixels=max_pixels)

    def generate(
        self,
        prompt: "str | Sequence[Message] | ModelInputs",
        images: "Sequence[ImageInput]" = (),
        videos: "Sequence[VideoInput]" = (),
        pruning: PruningConfig | None = None,
        max_new_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Result:
        """Answer one prompt.

        Args:
            prompt: a string (images, then videos, come before it), chat messages, or tensors.
            images: paths, bytes, PIL images or uint8 arrays.
            videos: paths, lists of images, or uint8 arrays [frames, height, width, 3].
            pruning: how visual tokens are pruned; None is PruningConfig().
            max_new_tokens: longest answer; it also ends where the context is full.
            sampling: how tokens are drawn; None is greedy.
            stop: strings that end the answer and are not part of it.
            ignore_eos: go on after a stop token.
            return_logits: give the logits of every step.
            min_pixels: enlarge smaller images to this area.
            max_pixels: shrink larger images to this area.

        Raises:
            InvalidInput: something that cannot be used as given.
            BackendError: the runtime failed.
        """
        stream = self.stream(
            prompt,
            images,
            videos,
            pruning,
            max_new_tokens,
            sampling,
            stop,
            ignore_eos=ignore_eos,
            return_logits=return_logits,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: "str | Sequence[Message] | ModelInputs",
        images: "Sequence[ImageInput]" = (),
        videos: "Sequence[VideoInput]" = (),
        pruning: PruningConfig | None = None,
        max_new_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "TextStream":
        """As generate, but the answer's text comes in pieces: iterate, then read `.result`."""
        started = time.perf_counter()
        inputs = self.prepare(prompt, images, videos, min_pixels=min_pixels, max_pixels=max_pixels)
        row = Row(self, inputs, pruning, max_new_tokens, sampling, stop, ignore_eos, return_logits)
        return TextStream(Run(self, [row], started))

    def generate_batch(
        self,
        requests: "Sequence[Request | str | Sequence[Message] | ModelInputs]",
        pruning: PruningConfig | None = None,
        max_new_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        *,
        ignore_eos: bool = False,
        return_logits: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> list[Result]:
        """Answer several prompts side by side; each result equals the one that generate gives alone.

        Raises:
            InvalidInput: something that cannot be used as given, with the number of the request.
            BackendError: the runtime failed.
        """
        started = time.perf_counter()
        prompts = []
        for number, request in enumerate(requests):
            entry = request if isinstance(request, Request) else Request(request)
            try:
                prompts.append(
                    self.prepare(entry.prompt, entry.images, entry.videos, min_pixels=min_pixels, max_pixels=max_pixels)
                )
            except InvalidInput as error:
                raise InvalidInput(f"requests[{number}]: {error}") from error
        if not prompts:
            return []
        rows = [
            Row(self, inputs, pruning, max_new_tokens, sampling, stop, ignore_eos, return_logits) for inputs in prompts
        ]
        run = Run(self, rows, started)
        for _ in run.steps():
            pass
        return run.results()

    def trace(self, inputs: ModelInputs, pruning: PruningConfig, forced_tokens: Sequence[int]) -> Trace:
        """Run one prompt with given tokens and keep what every stage made.

        Args:
            inputs: the prompt.
            pruning: how it is pruned.
            forced_tokens: the tokens decoded one after another; logits has one row more.

        Raises:
            InvalidInput: something that cannot be used as given.
        """
        row = Row(self, inputs, pruning, len(forced_tokens) + 1, None, (), True, True)
        run = Run(self, [row], time.perf_counter())
        layout = row.layout
        run.take(run.prefill())
        hidden = run.generation.hidden_states()[0]
        for token in forced_tokens:
            run.take(run.decode(np.array([token], np.int64)))
        result = run.results()[0]
        assert result.logits is not None
        embeds = run.visual.numpy().astype(np.float32)[layout.visual_rows[layout.visual_rows >= 0]]
        return Trace(embeds, result.scores, result.kept_indices, hidden, result.logits)

    def layout(self, inputs: ModelInputs, query: str = "paper") -> PromptLayout:
        """Where everything of a prompt lies.

        Raises:
            InvalidInput: tensors that do not fit each other.
        """
        manifest = self.bundle.manifest
        chat = self._processor.chat
        layout = prompt_layout(
            inputs,
            self.family,
            manifest.special_tokens,
            query,
            None if chat is None else chat.turn_query_mask,
        )
        vocab, context = manifest.language.vocab_size, manifest.language.max_position_embeddings
        if layout.input_ids.min() < 0 or layout.input_ids.max() >= vocab:
            raise InvalidInput(
                f"input_ids: got ids from {layout.input_ids.min()} to {layout.input_ids.max()}, "
                f"expected 0 to {vocab - 1}"
            )
        if layout.next_position >= context:
            raise InvalidInput(
                f"prompt: got {layout.next_position} positions, expected fewer than {context}, the model's context. "
                "Shorten the text, or shrink the images with max_pixels"
            )
        return layout

    def encode(self, rows: Sequence[ModelInputs], layouts: Sequence[PromptLayout]) -> Visual:
        """Visual embeddings of all rows: those of each row's images, then its videos."""
        return self.encode_rows(rows, layouts)[0]

    def encode_rows(self, rows: Sequence[ModelInputs], layouts: Sequence[PromptLayout]) -> tuple[Visual, list[int]]:
        """As encode, and of each row how many images and videos the vision stage did not run for."""
        patches = list(self._patches(rows, layouts))
        streamed = any(isinstance(own.pixel_values, StreamedRows) for _, own in patches)  # to hash is to read twice
        if not patches or streamed or not self.vision_cache.max_bytes:
            feeds = (feed for _, own in patches for feed in self._feeds(own))
            return self.backend.encode(feeds, sum(layout.num_rows for layout in layouts)), [0] * len(rows)
        items = [(row, item) for row, own in patches for item in one_by_one(own)]
        visual, known = self.vision_cache.encode([item for _, item in items], self._encode_item)
        cached = [0] * len(rows)
        for (row, _), hit in zip(items, known, strict=True):
            cached[row] += hit
        return visual, cached

    def chat_tokenizer(self) -> Any:  # noqa: ANN401 - the tokenizers package has no types
        """The tokenizer, None where the bundle has none."""
        return None if self._processor.chat is None else self._processor.chat.tokenizer

    def _encode_item(self, item: Patches) -> Visual:
        tokens = self.bundle.manifest.vision.tokens_per_item(item.grid_thw)
        return self.backend.encode(self._feeds(item), int(tokens.sum()))

    def _feeds(self, patches: Patches) -> Iterator[dict[str, npt.NDArray[Any]]]:
        return self.family.vision_feeds(patches, self.backend.max_vision_patches)

    def _patches(self, rows: Sequence[ModelInputs], layouts: Sequence[PromptLayout]) -> Iterator[tuple[int, Patches]]:
        """The images and the videos of each row, with its number."""
        for row, (inputs, layout) in enumerate(zip(rows, layouts, strict=True)):
            for name, pixels, grid in (
                ("pixel_values", inputs.pixel_values, layout.image_grid_thw),
                ("pixel_values_videos", inputs.pixel_values_videos, layout.video_grid_thw),
            ):
                if (pixels is None) != (not len(grid)):
                    raise InvalidInput(f"{name}: got it without its grid_thw, or the grid without it; expected both")
                if pixels is not None:
                    # a long video is read as the vision stage gets to it
                    whole = pixels if isinstance(pixels, StreamedRows) else np.asarray(pixels, np.float32)
                    yield row, Patches(whole, grid)


class TextStream:
    """The text of one answer, piece by piece; `.result` after the last."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps = run.steps()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next piece that is not empty."""
        while True:
            piece = next(self._steps)[0]
            if piece:
                return piece

    @property
    def result(self) -> Result:
        """The whole result; what is left of the answer is generated first."""
        for _ in self._steps:
            pass
        return self._run.results()[0]
