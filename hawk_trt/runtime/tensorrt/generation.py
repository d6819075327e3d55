"""One request, or one batch of them, in TensorRT: the prefill, then decode steps over the engines' one KV cache."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import DecodeInputs, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache
from hawk_trt.runtime.tensorrt.decode import DecodeStep
from hawk_trt.runtime.tensorrt.engine import Context
from hawk_trt.runtime.tensorrt.memory import Memory
from hawk_trt.runtime.tensorrt.vision import Encoder


class Prefill:
    """first_layer and decoder over a prompt."""

    def __init__(
        self, memory: Memory, cache: KVCache, stages: tuple[Context, Context], embedding_table: npt.NDArray[Any]
    ) -> None:
        """Keep what a prefill needs.

        Args:
            memory: where all tensors lie.
            cache: that it writes.
            stages: first_layer and decoder in their prefill profiles.
            embedding_table: [vocab, hidden].
        """
        self._memory, self._cache, self._table = memory, cache, embedding_table
        self._first_layer, self._decoder = stages
        # the end of first_layer, and that of decoder
        self._events = (memory.cuda.event(), memory.cuda.event())

    def scores(self, inputs: PrefillInputs, num_visual: int) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Layer 0 runs on one token, and its cache is dropped."""
        dims = self._bind(inputs, num_visual, 1)
        self._upload(inputs)
        self._first_layer.enqueue()
        scores: npt.NDArray[np.float32] = self._memory.read("scores", dims)
        return scores

    def run(self, inputs: PrefillInputs, num_visual: int, *, logits: bool) -> PrefillOutputs:
        """Run both stages; the first num_visual rows of visual_embeds are the prompt's."""
        memory, cuda, kept = self._memory, self._memory.cuda, inputs.num_kept_total
        started = time.perf_counter()
        self._cache.check_room(kept)
        dims = self._bind(inputs, num_visual, kept)
        self._decoder.bind(dims, {**memory.addresses, **self._cache.addresses()})
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

    def _bind(self, inputs: PrefillInputs, num_visual: int, num_kept_total: int) -> dict[str, int]:
        """Set shapes and addresses of first_layer; returns the sizes of all dimensions."""
        batch, seq_len = inputs.source_rows.shape
        dims = {"batch": batch, "seq_len": seq_len, "num_text": len(inputs.text_ids), "num_visual": num_visual}
        dims |= {"num_kept_total": num_kept_total, **self._cache.dims(num_kept_total)}
        self._first_layer.bind(dims, {**self._memory.addresses, **self._cache.addresses()})
        return dims

    def _upload(self, inputs: PrefillInputs) -> None:
        """Enqueue the uploads of first_layer's inputs; they fit where _bind took them.

        slots and context_slots are not among them: only their lengths count.
        """
        arrays = {
            "text_embeds": self._table[inputs.text_ids],
            "source_rows": inputs.source_rows,
            "position_ids": inputs.position_ids,
            "query_weights": inputs.query_weights,
            "select_bias": inputs.select_bias,
            "head_weights": inputs.head_weights,
            "kv_start": inputs.kv_start,
        }
        if self._cache.inplace:
            arrays["write_index"] = np.zeros(len(inputs.source_rows), np.int64)
        for name, array in arrays.items():
            self._memory.upload(name, array)


class TensorRtGeneration:
    """A request in progress. It ends where the backend starts another: there is one KV cache."""

    def __init__(
        self, memory: Memory, cache: KVCache, encoder: Encoder, prefill: Prefill, decode_step: DecodeStep, batch: int
    ) -> None:
        self._memory, self._cache, self._encoder = memory, cache, encoder
        self._prefill, self._decode_step, self.batch = prefill, decode_step, batch
        self.columns = cache.context
        self._turn = cache.turn
        self._kept = 0  # positions in the last step's hidden_states

    @property
    def nbytes(self) -> int:
        """Bytes of the engines' one KV cache."""
        return self._cache.nbytes

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt.

        Raises:
            BackendError: a prompt beyond what the engines were built for, or TensorRT or CUDA failed.
        """
        self._check_turn()
        num_visual = self._encoder.rows(visual)
        with self._memory.cuda.active():
            self._cache.checked_rows = None
            outputs = self._prefill.run(inputs, num_visual, logits=logits)
            self._cache.advance(inputs.num_kept_total, self.batch)
        self._kept = inputs.num_kept_total
        return outputs

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row.

        Raises:
            BackendError: the cache is full, or TensorRT or CUDA failed.
        """
        self._check_turn()
        self._cache.check_room(1)
        with self._memory.cuda.active():
            self._cache.checked_rows = None
            next_token = self._decode_step.run(inputs)
            self._cache.advance(1, self.batch)
            self._kept = 1
            return StepOutputs(next_token, self._memory.read("logits", {"batch": self.batch}) if logits else None)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        self._check_turn()
        if not self._kept:
            raise BackendError("hidden_states: nothing was run yet, expected a prefill before")
        with self._memory.cuda.active():
            dims = {"batch": self.batch, "num_kept_total": self._kept}
            return self._memory.read("hidden_states", dims).astype(np.float32)

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, columns, head_dim], as far as written."""
        self._check_turn()
        with self._memory.cuda.active():
            return self._cache.read(self._memory.cuda, layer, self.batch)

    def _check_turn(self) -> None:
        if self._turn != self._cache.turn:
            raise BackendError(
                "generation: another was started on the same engines, whose KV cache holds one at a time. "
                "Finish a stream before the next, put prompts into one batch, or load a second Pipeline"
            )
