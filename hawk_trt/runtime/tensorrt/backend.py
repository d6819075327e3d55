"""TensorRtBackend: the plans of an engine folder on one GPU, loaded once, and what requests share."""

import traceback
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tensorrt as trt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import PREFILL, EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import Generation, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache
from hawk_trt.runtime.tensorrt.cuda import CudaDevice
from hawk_trt.runtime.tensorrt.decode import DecodeStep
from hawk_trt.runtime.tensorrt.engine import Context, Engine, Runtime
from hawk_trt.runtime.tensorrt.generation import TensorRtGeneration
from hawk_trt.runtime.tensorrt.machine import this_machine
from hawk_trt.runtime.tensorrt.memory import Memory, tensor_sizes
from hawk_trt.runtime.tensorrt.staging import Staging
from hawk_trt.runtime.tensorrt.vision import Encoder, HostVisual, TensorRtVisual
from hawk_trt.stages import FIRST_LAYER, STAGES

_OwnVisual = TypeVar("_OwnVisual", TensorRtVisual, HostVisual)
_SCRATCH = "scratch"
_CACHE = "cache"


class TensorRtBackend:
    """An engine folder in TensorRT. Make it with `load`.

    Attributes:
        engines: what was loaded.
        manifest: its manifest.
        cuda: the GPU.
        memory: the one allocation that everything lies in.
        staging: ways in and out of it.
        contexts: execution contexts by stage and optimization profile.
        cache: the KV cache.
        encoder: runs the vision plan.
        decode_step: replays decode steps.
        events: of the end of the first layer and the end of the decoder in a prefill.
        embedding_table: [vocab, hidden], memory-mapped.
        max_context: columns that the KV cache holds.
        max_vision_patches: of one vision call; one frame alone may have more.
        turn: counts generations.
        cache_checked: rows whose last logits tell whether the cache is finite; None after a run that failed.
    """

    name = "tensorrt"
    max_vision_patches = 1  # a vision plan takes one frame
    max_context: int | None
    can_gather = False  # there is one KV cache, whose rows are all of one generation

    def __init__(self, engines: EngineFolder, cuda: CudaDevice) -> None:
        manifest = engines.manifest
        self.engines, self.manifest, self.cuda = engines, manifest, cuda
        self.device = f"cuda:{cuda.index}"
        self.profile = manifest.profile
        self.embedding_table: npt.NDArray[Any] = np.asarray(engines.bundle.embedding_table())
        self.max_context = manifest.limits.context
        self.turn = 0
        self.contexts: dict[tuple[str, int], Context] = {}
        plans = self._load_plans()
        sizes = {
            _SCRATCH: max(engine.scratch_bytes for engine in plans.values()),
            _CACHE: KVCache.size_bytes(manifest),
            **tensor_sizes(manifest),
            **Encoder.sizes(engines),
            **DecodeStep.sizes(engines),
        }
        self.memory = Memory(cuda, sizes)
        self.staging = Staging(cuda)
        self.events = (cuda.event(), cuda.event())
        self.cache = KVCache(manifest, self.memory.addresses[_CACHE])
        self.cache_checked: int | None = None  # the first start zeroes it
        for stage, engine in plans.items():
            for profile in range(len(engine.entry.profiles)):
                context = engine.context(profile, self.memory.addresses[_SCRATCH], cuda.stream)
                cuda.on_close(context.close)
                self.contexts[stage, profile] = context
        self.encoder = Encoder(self)
        self.decode_step = DecodeStep(self)
        cuda.on_close(self.decode_step.close)
        self.staging.synchronize()

    @classmethod
    def load(cls, engines: EngineFolder, device: str, profile: str | None) -> "TensorRtBackend":
        """Load the plans of a folder.

        Args:
            engines: the folder.
            device: "cuda" or "cuda:N".
            profile: the lowering that the folder must have; None takes what it has.

        Raises:
            BackendError: no such GPU, too little of its memory, or TensorRT refused.
            BundleError: plans for another GPU or by another TensorRT, or of another profile.
        """
        kind, _, index = device.partition(":")
        if kind != "cuda" or not (index or "0").isdigit():
            raise BackendError(f'device: got {device!r}, TensorRT runs on "cuda" or "cuda:N"')
        if profile is not None and profile != engines.manifest.profile:
            raise BackendError(
                f"profile: got {profile!r}, these engines are {engines.manifest.profile}. "
                f"Leave it out, or rebuild with --profile {profile}: {engines.manifest.rebuild}"
            )
        # Before any TensorRT object: without a driver those crash.
        cuda = CudaDevice(int(index or 0))
        try:
            engines.check_machine(this_machine(trt.__version__, cuda.index))
            with cuda.active():
                return cls(engines, cuda)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold TensorRT objects, which go before the context
            cuda.close()
            raise

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> TensorRtVisual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""
        with self.cuda.active():
            return self.encoder.encode(feeds, num_rows)

    def keep(self, visual: Visual) -> HostVisual:
        """A copy on the host, since every encode overwrites the one before."""
        with self.cuda.active():
            return self.encoder.keep(_own(visual, TensorRtVisual))

    def join(self, parts: Sequence[Visual]) -> TensorRtVisual:
        """Rows of what keep gave, one below the other, where first_layer reads them."""
        with self.cuda.active():
            return self.encoder.join([_own(part, HostVisual) for part in parts])

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Layer 0 runs on one token, and its cache is dropped."""
        with self.cuda.active():
            self._restart()
            self.bind_prompt(inputs, visual, 1)
            self.upload_prompt(inputs)
            self.contexts[FIRST_LAYER, PREFILL].enqueue()
            scores: npt.NDArray[np.float32] = self.read("scores", inputs.input_ids.shape, "float32")
        return scores

    def start(self, batch: int, columns: int) -> TensorRtGeneration:
        """A generation whose KV cache holds up to `columns` tokens a row. It ends the one before.

        Raises:
            BackendError: more columns than the engines were built for.
        """
        if columns > self.cache.context:
            raise BackendError(
                f"KV cache: got {columns} tokens to keep and generate, these engines hold {self.cache.context}. "
                f"Lower keep_ratio or max_new_tokens, or rebuild with a larger --max-context: {self.manifest.rebuild}"
            )
        with self.cuda.active():
            self._restart()
        return TensorRtGeneration(self, batch)

    def gather(self, parts: "Sequence[tuple[Generation, int]]", columns: int) -> TensorRtGeneration:
        """Refused: generations do not lie side by side here."""
        raise BackendError(
            f"gather: got {len(parts)} rows for {columns} columns, and TensorRT holds one generation at a time. "
            "Put the prompts into one batch"
        )

    def bind_prompt(self, inputs: PrefillInputs, visual: Visual, num_kept_total: int) -> dict[str, int]:
        """Set shapes and addresses of first_layer over a prompt; returns the sizes of all dimensions."""
        own = _own(visual, TensorRtVisual)
        own.check(self)
        batch, seq_len = inputs.input_ids.shape
        dims = {"batch": batch, "seq_len": seq_len, "num_visual": own.rows, "num_kept_total": num_kept_total}
        dims |= self.cache.dims(num_kept_total)
        self.contexts[FIRST_LAYER, PREFILL].bind(dims, self.addresses())
        return dims

    def upload_prompt(self, inputs: PrefillInputs) -> None:
        """Enqueue the uploads of first_layer's inputs over a prompt; they fit where bind_prompt took them.

        slots and context_slots are not among them: only their lengths count.
        """
        arrays = {
            "text_embeds": self.embedding_table[inputs.input_ids],
            "visual_rows": inputs.visual_rows,
            "position_ids": inputs.position_ids,
            "query_weights": inputs.query_weights,
            "select_bias": inputs.select_bias,
            "head_weights": inputs.head_weights,
            "kv_start": inputs.kv_start,
        }
        if self.cache.inplace:
            arrays["write_index"] = np.zeros(len(inputs.input_ids), np.int64)
        for name, array in arrays.items():
            self.staging.upload(self.memory.addresses[name], array)

    def addresses(self) -> dict[str, int]:
        """Address of every tensor of a prefill."""
        return {**self.memory.addresses, **self.cache.addresses()}

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """A host copy of a tensor, after all enqueued work."""
        return self.staging.download(self.memory.addresses[name], shape, numpy_dtype(dtype))

    def read_logits(self, batch: int) -> npt.NDArray[np.float32]:
        """The last logits: float32 [batch, vocab]."""
        logits: npt.NDArray[np.float32] = self.read(
            "logits", (batch, self.manifest.bundle.language.vocab_size), "float32"
        )
        return logits

    def close(self) -> None:
        """Release everything. Closing again does nothing."""
        self.cuda.close()

    def _load_plans(self) -> dict[str, Engine]:
        """Deserialise all plans, the plugin before them."""
        runtime = Runtime()
        self.cuda.on_close(runtime.close)
        plugin = self.engines.plugin
        if plugin is not None:
            runtime.load_plugin(plugin)
        plans = {}
        for stage in STAGES:
            entry = self.engines.plan(stage)
            plans[stage] = runtime.load(self.engines.folder / entry.file, entry, self.manifest.rebuild)
            self.cuda.on_close(plans[stage].close)
        return plans

    def _restart(self) -> None:
        """End the generation before, and zero the cache where it may hold what is not finite.

        A masked column still counts with weight 0, and 0 x NaN is NaN. What the last logits of a generation saw
        is all that it wrote, so if they are finite the cache is. What `score` writes, the first column of layer 0,
        every prefill overwrites.
        """
        self.turn += 1
        rows = self.cache_checked
        if self.cache.inplace and (rows is None or not np.isfinite(self.read_logits(rows)).all()):
            self.cuda.zero(self.memory.addresses[_CACHE], KVCache.size_bytes(self.manifest))
        self.cache_checked = 0
        self.cache.restart()


def _own(visual: Visual, kind: type[_OwnVisual]) -> _OwnVisual:
    if not isinstance(visual, kind):
        raise BackendError(f"visual: got {type(visual).__name__}, expected {kind.__name__}, made by this backend")
    return visual
