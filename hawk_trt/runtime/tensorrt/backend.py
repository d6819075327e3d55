"""TensorRtBackend: the plans of an engine folder on one GPU, loaded once, and what requests share."""

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt

from hawk_trt.engine_folder import DECODE, PREFILL, EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import Generation, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache
from hawk_trt.runtime.tensorrt.cuda import CudaDevice, this_machine
from hawk_trt.runtime.tensorrt.decode import DecodeStep
from hawk_trt.runtime.tensorrt.engine import Context, load_plans
from hawk_trt.runtime.tensorrt.generation import Prefill, TensorRtGeneration
from hawk_trt.runtime.tensorrt.memory import Memory
from hawk_trt.runtime.tensorrt.vision import Encoder
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION

_SCRATCH = "scratch"
_CACHE = "cache"


class TensorRtBackend:
    """An engine folder in TensorRT, for `load` to make.

    Attributes:
        memory: the one allocation that everything lies in.
        contexts: execution contexts by stage and optimization profile.
        embedding_table: [vocab, hidden], memory-mapped.
        max_vision_patches: of one feed of the vision stage; the encoder cuts it into calls of what the plan takes.
    """

    name = "tensorrt"

    def __init__(self, engines: EngineFolder, cuda: CudaDevice) -> None:
        manifest = engines.manifest
        self.engines, self.cuda = engines, cuda
        self.device = f"cuda:{cuda.index}"
        self.target = manifest.target
        self.embedding_table: npt.NDArray[Any] = np.asarray(engines.bundle.embedding_table())
        self.max_vision_patches = manifest.limits.visual_tokens * manifest.bundle.vision.spatial_merge_size**2
        self.max_context: int | None = manifest.limits.context
        self.max_batch: int | None = manifest.limits.batch
        plans = load_plans(engines)
        regions = {
            _SCRATCH: max(engine.scratch_bytes for engine in plans.values()),
            _CACHE: KVCache.size_bytes(manifest),
            **Encoder.sizes(engines),
            **Prefill.sizes(manifest),
            **DecodeStep.sizes(manifest),
        }
        for engine in plans.values():
            cuda.on_close(engine.close)
        self.memory = Memory(cuda, manifest, regions)
        scratch = self.memory.addresses[_SCRATCH]
        self.contexts: dict[tuple[str, int], Context] = {}
        for stage, engine in plans.items():
            for profile in range(len(engine.entry.profiles)):
                context = Context(engine, profile, scratch, cuda.stream)
                cuda.on_close(context.close)
                self.contexts[stage, profile] = context
        prefill, decode = ((self.contexts[FIRST_LAYER, p], self.contexts[DECODER, p]) for p in (PREFILL, DECODE))

        def more_stages() -> tuple[Context, Context]:
            first, decoder = (Context(plans[stage], DECODE, scratch, cuda.stream) for stage in (FIRST_LAYER, DECODER))
            return first, decoder

        self.cache = KVCache(manifest, self.memory.addresses[_CACHE])
        self.can_gather = self.cache.shared
        cuda.zero(self.memory.addresses[_CACHE], self.cache.nbytes)
        vision = [context for (stage, _), context in self.contexts.items() if stage == VISION]
        self.encoder = Encoder(self.memory, vision, engines)
        self.encode, self.keep, self.join = self.encoder.encode, self.encoder.keep, self.encoder.join
        self.prefill = Prefill(self.memory, self.cache, prefill, self.embedding_table)
        self.decode_step = DecodeStep(self.memory, self.cache, decode, more_stages, self.embedding_table)
        cuda.synchronize()

    @classmethod
    def load(cls, engines: EngineFolder, device: str, target: str | None) -> "TensorRtBackend":
        """Load the plans of a folder on "cuda" or "cuda:N"; target: that the folder must have, None takes what it has.

        Raises:
            BackendError: no such GPU, too little of its memory, or TensorRT refused.
            BundleError: plans for another GPU or by another TensorRT, or of another target.
        """
        kind, _, index = device.partition(":")
        if kind != "cuda" or not (index or "0").isdigit():
            raise BackendError(f'device: got {device!r}, TensorRT runs on "cuda" or "cuda:N"')
        if target is not None and target != engines.manifest.target:
            raise BackendError(
                f"target: got {target!r}, these engines are of {engines.manifest.target}. "
                f"Leave it out, or rebuild with --target {target}: {engines.manifest.rebuild}"
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

    @property
    def max_start(self) -> int:
        """Rows that a generation can have now beside those that run."""
        return self.cache.most_together

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Those that run keep what they have."""
        num_visual = self.encoder.rows(visual)
        with self.cuda.active():
            return self.prefill.scores(inputs, num_visual)

    def start(self, batch: int, columns: int) -> TensorRtGeneration:
        """A generation whose KV cache holds up to `columns` tokens a row.

        Where no neighbouring slots are free it ends others, and without can_gather every other.

        Raises:
            BackendError: more columns or rows than the engines were built for.
        """
        if columns > self.cache.context:
            raise BackendError(
                f"KV cache: got {columns} tokens to keep and generate, these engines hold {self.cache.context}. Lower "
                f"keep_ratio or max_new_tokens, or rebuild with a larger --max-context: {self.engines.manifest.rebuild}"
            )
        slots = self.cache.find(batch)
        with self.cuda.active():
            self.cache.prepare(self.cuda, slots, columns)
        return TensorRtGeneration(self.encoder, self.prefill, self.decode_step, slots)

    def gather(self, parts: "Sequence[tuple[Generation, int]]", columns: int) -> TensorRtGeneration:  # noqa: ARG002
        """Rows of several generations as one, in the slots where they are: nothing is copied."""
        own = [(part, row) for part, row in parts if isinstance(part, TensorRtGeneration)]
        if not self.can_gather or len(own) != len(parts):
            raise BackendError(
                "gather: got rows that do not lie in slots of these engines' KV cache. Put the prompts into one batch"
            )
        return TensorRtGeneration.gather(own)

    def close(self) -> None:
        """Release everything. Closing again does nothing."""
        self.cuda.close()
