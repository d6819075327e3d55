"""Requests that run together in TensorRT: their prefill, then decode steps over their slots of the KV cache."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.engine_folder import EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import DecodeInputs, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache, Slots, row_bytes
from hawk_trt.runtime.tensorrt.decode import DecodeStep
from hawk_trt.runtime.tensorrt.engine import Context
from hawk_trt.runtime.tensorrt.memory import Memory
from hawk_trt.runtime.tensorrt.vision import Encoder
from hawk_trt.stages import in_place, key_name, value_name

# Regions for layer 0's keys and values where only scores are asked for, so that no slot is written.
_UNKEPT = "unkept/"


class Prefill:
    """first_layer and decoder, in their prefill profiles, over prompts."""

    def __init__(
        self, memory: Memory, cache: KVCache, stages: tuple[Context, Context], embedding_table: npt.NDArray[Any]
    ) -> None:
        self.memory, self.cache, self._table = memory, cache, embedding_table
        self._first_layer, self._decoder = stages
        # the end of first_layer, and that of decoder
        self._events = (memory.cuda.event(), memory.cuda.event())

    @staticmethod
    def sizes(manifest: EngineManifest) -> dict[str, int]:
        """Bytes of the regions that it needs, by name."""
        columns = manifest.limits.context if in_place(manifest.target) else 1
        size = manifest.limits.batch * row_bytes(manifest) // manifest.limits.context * columns
        return {_UNKEPT + name(0, past=False): size for name in (key_name, value_name)}

    def scores(self, inputs: PrefillInputs, num_visual: int) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Layer 0 runs on one token, and its cache is dropped."""
        places = self.cache.addresses()
        for name in (key_name, value_name):
            unkept = self.memory.addresses[_UNKEPT + name(0, past=False)]
            places |= {name(0, past=past): unkept for past in ((True, False) if self.cache.inplace else (False,))}
        dims = self._dims(inputs, num_visual, 1)
        self._first_layer.bind(dims, {**self.memory.addresses, **places})
        self._upload(inputs)
        self._first_layer.enqueue()
        scores: npt.NDArray[np.float32] = self.memory.read("scores", dims)
        return scores

    def run(self, inputs: PrefillInputs, num_visual: int, first: int, *, logits: bool) -> PrefillOutputs:
        """Run both stages into empty slots, the first of them given.

        The first num_visual rows of visual_embeds are the prompts'.
        """
        memory, cuda = self.memory, self.memory.cuda
        started = time.perf_counter()
        dims = self._dims(inputs, num_visual, inputs.num_kept_total)
        addresses = {**memory.addresses, **self.cache.addresses(first)}
        self._first_layer.bind(dims, addresses)
        self._decoder.bind(dims, addresses)
        self._upload(inputs)
        self._first_layer.enqueue()
        cuda.record(self._events[0])
        self._decoder.enqueue()
        cuda.record(self._events[1])
        next_token = memory.read("next_token", dims)  # waits for all of it
        step = StepOutputs(next_token, memory.read("logits", dims) if logits else None)
        kept_indices, scores = memory.read("kept_indices", dims), memory.read("scores", dims)
        decoder_seconds = cuda.seconds(*self._events)
        return PrefillOutputs(
            step, kept_indices, scores, time.perf_counter() - started - decoder_seconds, decoder_seconds
        )

    def _dims(self, inputs: PrefillInputs, num_visual: int, num_kept_total: int) -> dict[str, int]:
        batch, seq_len = inputs.source_rows.shape
        dims = {"batch": batch, "seq_len": seq_len, "num_text": len(inputs.text_ids), "num_visual": num_visual}
        return dims | {"num_kept_total": num_kept_total, **self.cache.dims(num_kept_total, 0)}

    def _upload(self, inputs: PrefillInputs) -> None:
        """Enqueue the uploads of first_layer's inputs but slots and context_slots, of which only the lengths count."""
        arrays = {
            "text_embeds": self._table[inputs.text_ids],
            "source_rows": inputs.source_rows,
            "position_ids": inputs.position_ids,
            "query_weights": inputs.query_weights,
            "select_bias": inputs.select_bias,
            "head_weights": inputs.head_weights,
            "kv_start": inputs.kv_start,
        }
        if self.cache.inplace:
            arrays["write_index"] = np.zeros(len(inputs.source_rows), np.int64)
        for name, array in arrays.items():
            self.memory.upload(name, array)


class TensorRtGeneration:
    """Requests in progress, in slots of the KV cache. It ends where another takes those, or a step fails."""

    def __init__(self, encoder: Encoder, prefill: Prefill, decode_step: DecodeStep, slots: Slots) -> None:
        self._encoder, self._prefill, self._decode_step, self._slots = encoder, prefill, decode_step, slots
        self._memory, self._cache = prefill.memory, prefill.cache
        self.batch, self.columns = len(slots), self._cache.columns
        self._step = 0  # number of its last one
        self._rows, self._kept = slots, 0  # rows of that step's hidden_states that are its own, and positions in them
        self._cache.give(slots, self)

    @classmethod
    def gather(cls, parts: "Sequence[tuple[TensorRtGeneration, int]]") -> "TensorRtGeneration":
        """Rows of several generations as one, where they lie; what else these have is free."""
        for generation, _ in parts:
            generation._check_slots([row for other, row in parts if other is generation])
        for generation, _ in parts:
            generation._cache.release(generation._slots, generation)
        slots = np.array([generation._slots[row] for generation, row in parts], np.int64)
        first, _ = parts[0]
        return cls(first._encoder, first._prefill, first._decode_step, slots)

    @property
    def nbytes(self) -> int:
        """As Generation's."""
        return self._cache.nbytes * self.batch // self._cache.batch

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt.

        Raises:
            BackendError: a prompt beyond what the engines were built for, or TensorRT or CUDA failed.
        """
        self._check_slots()
        with self._running():
            num_visual = self._encoder.rows(visual)
            self._cache.check_room(inputs.num_kept_total, self._slots)
            outputs = self._prefill.run(inputs, num_visual, int(self._slots[0]), logits=logits)
            self._cache.starts[self._slots] = inputs.kv_start
            self._cache.store_prompt(self._memory.cuda, self._slots, inputs.num_kept_total)
            self._advance(inputs.num_kept_total, np.arange(self.batch), outputs.step.logits)
        return outputs

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row.

        Raises:
            BackendError: the cache is full, or TensorRT or CUDA failed.
        """
        self._check_slots()
        self._cache.check_room(1, self._slots)
        with self._running():
            next_token, rows = self._decode_step.run(inputs, self._slots)
            read = self._memory.read("logits", {"batch": rows})[self._slots] if logits else None
            self._advance(1, self._slots, read)
        return StepOutputs(next_token, read)

    def release(self, row: int) -> None:
        """Let a row's slot be free for the next prompt; the others go on once they are gathered."""
        if self._cache.shared:
            self._cache.release(self._slots[[row]], self)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        self._check_slots()
        if not self._kept:
            raise BackendError("hidden_states: nothing was run yet, expected a prefill before")
        if self._step != self._cache.num_steps:
            raise BackendError("hidden_states: another generation's step has overwritten them; read them before it")
        with self._memory.cuda.active():
            dims = {"batch": int(self._rows.max()) + 1, "num_kept_total": self._kept}
            return self._memory.read("hidden_states", dims)[self._rows].astype(np.float32)

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, columns, head_dim], as far as written."""
        self._check_slots()
        with self._memory.cuda.active():
            return self._cache.read(self._memory.cuda, layer, self._slots)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Around a step; one that fails ends the generation, whoever still refers to it."""
        self._step = self._cache.begin_step(self._slots)
        try:
            with self._memory.cuda.active():
                yield
        except BaseException:
            self._cache.release(self._slots, self)
            raise

    def _advance(self, columns: int, rows: Slots, logits: npt.NDArray[np.float32] | None) -> None:
        """Count a step; its logits, where they were read, have seen all that its slots hold."""
        self._cache.ends[self._slots] += columns
        self._rows, self._kept = rows, columns
        if logits is not None:
            self._cache.finite[self._slots] = np.isfinite(logits).all(axis=1)

    def _check_slots(self, rows: "Sequence[int] | slice" = slice(None)) -> None:
        if any(self._cache.owner(slot) is not self for slot in self._slots[rows]):
            raise BackendError(
                "generation: another was started on the same engines and has its place in the KV cache, or a step "
                "failed. Finish a stream before the next, put prompts into one batch, or load a second Pipeline"
            )
