"""TensorRtBackend: the plans of an engine folder on one GPU, loaded once, and what requests share."""

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt

from hawk_trt.engine_folder import DECODE, PREFILL, EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import PrefillOutputs, Row, StepOutputs, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache, Slots, TensorRtRow
from hawk_trt.runtime.tensorrt.cuda import CudaDevice, this_machine
from hawk_trt.runtime.tensorrt.decode import DecodeStep
from hawk_trt.runtime.tensorrt.engine import Context, load_plans
from hawk_trt.runtime.tensorrt.memory import Memory
from hawk_trt.runtime.tensorrt.vision import Encoder
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION

_SCRATCH = "scratch"
_CACHE = "cache"
# Regions for the scoring layer's keys and values where only scores are asked for, so that no slot is written.
_UNKEPT = "unkept/"


class TensorRtBackend:
    """An engine folder in TensorRT, for `load` to make.

    contexts: execution contexts by stage and optimization profile.  embedding_table: [vocab, hidden], memory-mapped.
    max_vision_patches: of one feed of the vision stage; the encoder cuts it into calls of what the plan takes.
    """

    name = "tensorrt"

    def __init__(self, engines: EngineFolder, cuda: CudaDevice) -> None:
        manifest = engines.manifest
        self.engines, self.cuda = engines, cuda
        self.device = f"cuda:{cuda.index}"
        self.target = manifest.target
        self._language = manifest.bundle.language
        self.embedding_table: npt.NDArray[Any] = np.asarray(engines.bundle.embedding_table())
        self.max_vision_patches = manifest.limits.visual_tokens * manifest.bundle.vision.spatial_merge_size**2
        self.max_context: int | None = manifest.limits.context
        self.max_batch: int | None = manifest.limits.batch
        plans = load_plans(engines)
        sizes = KVCache(manifest, 0)  # whose sizes alone count
        unkept = sizes.batch * sizes.row_bytes // (1 if sizes.inplace else sizes.context)
        scoring = self._language.scoring_layer
        regions = {
            _SCRATCH: max(engine.scratch_bytes for engine in plans.values()),
            _CACHE: sizes.nbytes,
            **{_UNKEPT + name: unkept for name in self._language.cache_names(scoring, past=False)},
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
        decode = self.contexts[FIRST_LAYER, DECODE], self.contexts[DECODER, DECODE]

        def more_stages() -> tuple[Context, Context]:
            first, decoder = (Context(plans[stage], DECODE, scratch, cuda.stream) for stage in (FIRST_LAYER, DECODER))
            return first, decoder

        self.cache = KVCache(manifest, self.memory.addresses[_CACHE])
        cuda.zero(self.memory.addresses[_CACHE], self.cache.nbytes)
        vision = [context for (stage, _), context in self.contexts.items() if stage == VISION]
        self.encoder = Encoder(self.memory, vision, engines)
        self.encode, self.keep, self.join = self.encoder.encode, self.encoder.keep, self.encoder.join
        self._ends = cuda.event(), cuda.event()  # of a prefill's first_layer, and of its decoder
        self.decode_step = DecodeStep(self.memory, self.cache, decode, more_stages, self.embedding_table)
        cuda.synchronize()

    @classmethod
    def load(cls, engines: EngineFolder, device: str, target: str | None) -> "TensorRtBackend":
        """Load the plans of a folder on "cuda" or "cuda:N"; target: that the folder must have, None takes what it has.

        Raises BackendError: no such GPU, too little of its memory, or TensorRT refused; BundleError: plans for another
        GPU or by another TensorRT, or of another target.
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
        return self.cache.most_together

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. The last layer runs on one token, and its cache is dropped."""
        arrays, dims = self._prompt(inputs, visual, 1)
        places = self.cache.addresses(0)
        layer, language = self._language.scoring_layer, self._language
        unkept = [self.memory.addresses[_UNKEPT + name] for name in language.cache_names(layer, past=False)]
        for past in (True, False) if self.cache.inplace else (False,):
            places |= dict(zip(language.cache_names(layer, past=past), unkept, strict=True))
        with self.cuda.active():
            first_layer = self.contexts[FIRST_LAYER, PREFILL]
            first_layer.bind(dims, {**self.memory.addresses, **places})
            self._upload(arrays)
            first_layer.enqueue()
            scores: npt.NDArray[np.float32] = self.memory.read("scores", dims)
        return scores

    def prefill(self, inputs: PrefillInputs, visual: Visual, columns: int, *, logits: bool) -> PrefillOutputs:  # noqa: ARG002
        """Run first_layer and decoder over prompts, into rows whose KV cache holds up to `columns` tokens each.

        Where no neighbouring slots are free it ends other rows. Raises BackendError: more than the engines were built
        for, or TensorRT or CUDA failed.
        """
        started, cache, memory = time.perf_counter(), self.cache, self.memory
        slots = cache.find(len(inputs.source_rows))
        with self.cuda.active():
            cache.prepare(self.cuda, slots)
        rows = [TensorRtRow(memory, cache, slot) for slot in slots.tolist()]
        with self._step(rows, slots):
            arrays, dims = self._prompt(inputs, visual, inputs.num_kept_total)
            cache.check_room(inputs.num_kept_total, slots)
            addresses = {**memory.addresses, **cache.addresses(int(slots[0]))}
            stages = [self.contexts[stage, PREFILL] for stage in (FIRST_LAYER, DECODER)]
            for stage in stages:
                stage.bind(dims, addresses)
            self._upload(arrays)
            for stage, end in zip(stages, self._ends, strict=True):
                stage.enqueue()
                self.cuda.record(end)
            next_token = memory.read("next_token", dims)  # waits for all of it
            read = memory.read("logits", dims) if logits else None
            kept_indices, scores = memory.read("kept_indices", dims), memory.read("scores", dims)
            decoder_seconds = self.cuda.seconds(*self._ends)
            first_layer_seconds = time.perf_counter() - started - decoder_seconds
            cache.starts[slots] = inputs.kv_start
            cache.store_prompt(self.cuda, slots, inputs.num_kept_total)
            for number, row in enumerate(rows):
                row.advance(number, inputs.num_kept_total)
            cache.look_at(slots, read)
        step = StepOutputs(next_token, read)
        return PrefillOutputs(rows, step, kept_indices, scores, first_layer_seconds, decoder_seconds)

    def _prompt(
        self, inputs: PrefillInputs, visual: Visual, num_kept_total: int
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int]]:
        """Host inputs of first_layer, and sizes of the stages' dimensions; the first visual rows are the prompts'."""
        arrays = inputs.arrays(self.embedding_table, zero_padding=self._language.linear is not None)
        batch, seq_len = inputs.source_rows.shape
        dims = {"batch": batch, "seq_len": seq_len, "num_text": len(arrays["text_embeds"])}
        dims |= {"num_visual": self.encoder.rows(visual), "num_kept_total": num_kept_total}
        return arrays, dims | self.cache.dims(num_kept_total, 0)

    def _upload(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Enqueue the uploads of what the target takes; of slots and context_slots only the lengths count."""
        for name, array in arrays.items():
            if name in self.memory.entries:
                self.memory.upload(name, array)

    def gather(self, rows: Sequence[Row], length: int, columns: int) -> None:  # noqa: ARG002
        """Rows of any prefills can step together in the slots where they are: nothing is copied."""
        _own_rows(rows)

    def decode(
        self, rows: Sequence[Row], tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], *, logits: bool
    ) -> StepOutputs:
        """Run both stages over a token of each row; BackendError: no room, a row lost its slot, or a run failed."""
        own = _own_rows(rows)
        slots = np.array([row.slot for row in own], np.int64)
        self.cache.check_room(1, slots)
        with self._step(own, slots):
            next_token, batch = self.decode_step.run(slots, tokens, positions)
            read = self.memory.read("logits", {"batch": batch})[slots] if logits else None
            for row in own:
                row.advance(row.slot, 1)
            self.cache.look_at(slots, read)
        return StepOutputs(next_token, read)

    @contextmanager
    def _step(self, rows: Sequence[TensorRtRow], slots: Slots) -> Iterator[None]:
        """Around a step; one that fails ends its rows, whoever still refers to them."""
        self.cache.begin_step(slots)
        try:
            with self.cuda.active():
                yield
        except BaseException:
            for row in rows:
                row.release()
            raise

    def close(self) -> None:
        self.cuda.close()


def _own_rows(rows: Sequence[Row]) -> list[TensorRtRow]:
    own = [row for row in rows if isinstance(row, TensorRtRow)]
    if len(own) != len(rows):
        raise BackendError("rows: got some of another backend, expected what this backend's prefill made")
    for row in own:
        row.check()
    return own
