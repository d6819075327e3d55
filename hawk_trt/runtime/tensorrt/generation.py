"""One request, or one batch of them, in TensorRT: the prefill, then decode steps over the backend's one KV cache."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import PREFILL
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.protocol import DecodeInputs, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.tensorrt.cache import KVCache
from hawk_trt.stages import DECODER, FIRST_LAYER

if TYPE_CHECKING:
    from hawk_trt.runtime.tensorrt.backend import TensorRtBackend


class TensorRtGeneration:
    """A request in progress. It ends where the backend starts another: there is one KV cache."""

    def __init__(self, backend: "TensorRtBackend", batch: int) -> None:
        self._backend = backend
        self._batch = batch
        self._turn = backend.turn
        self._kept = 0  # positions in the last step's hidden_states

    @property
    def nbytes(self) -> int:
        """Bytes of the engines' one KV cache."""
        return KVCache.size_bytes(self._backend.manifest)

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt.

        Raises:
            BackendError: a prompt beyond what the engines were built for, or TensorRT or CUDA failed.
        """
        backend, kept = self._backend, inputs.num_kept_total
        self._check_turn()
        with backend.cuda.active():
            started = time.perf_counter()
            backend.cache.check_room(kept)
            backend.cache_checked = None
            dims = backend.bind_prompt(inputs, visual, kept)
            decoder = backend.contexts[DECODER, PREFILL]
            decoder.bind(dims, backend.addresses())
            backend.upload_prompt(inputs)
            backend.contexts[FIRST_LAYER, PREFILL].enqueue()
            backend.cuda.record(backend.events[0])
            decoder.enqueue()
            backend.cuda.record(backend.events[1])
            step = self._read_step(logits=logits)  # waits for all of it
            backend.cache.advance(kept)
            backend.cache_checked = self._batch
            self._kept = kept
            shape = inputs.input_ids.shape
            kept_indices = backend.read("kept_indices", (self._batch, kept), "int64")
            scores = backend.read("scores", shape, "float32")
            decoder_seconds = backend.cuda.seconds(*backend.events)
            first_layer_seconds = time.perf_counter() - started - decoder_seconds
        return PrefillOutputs(step, kept_indices, scores, first_layer_seconds, decoder_seconds)

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row.

        Raises:
            BackendError: the cache is full, or TensorRT or CUDA failed.
        """
        backend = self._backend
        self._check_turn()
        backend.cache.check_room(1)
        with backend.cuda.active():
            backend.cache_checked = None
            next_token = backend.decode_step.run(inputs)
            backend.cache.advance(1)
            backend.cache_checked = self._batch
            self._kept = 1
            return StepOutputs(next_token, backend.read_logits(self._batch) if logits else None)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        self._check_turn()
        if not self._kept:
            raise BackendError("hidden_states: nothing was run yet, expected a prefill before")
        backend = self._backend
        entry = next(entry for entry in backend.engines.plan(FIRST_LAYER).outputs if entry.name == "hidden_states")
        shape = (self._batch, self._kept, backend.manifest.bundle.language.hidden_size)
        with backend.cuda.active():
            return backend.read("hidden_states", shape, entry.dtype).astype(np.float32)

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, columns, head_dim], as far as written."""
        self._check_turn()
        backend = self._backend
        language, cache = backend.manifest.bundle.language, backend.cache
        columns = cache.context if cache.inplace else cache.length
        shape = (self._batch, language.num_key_value_heads, columns, language.head_dim)
        dtype = numpy_dtype(backend.manifest.bundle.dtype)
        with backend.cuda.active():
            key, value = (backend.staging.download(address, shape, dtype) for address in cache.layer(layer))
        return key[:, :, : cache.length], value[:, :, : cache.length]

    def _read_step(self, *, logits: bool) -> StepOutputs:
        next_token = self._backend.read("next_token", (self._batch,), "int64")
        return StepOutputs(next_token, self._backend.read_logits(self._batch) if logits else None)

    def _check_turn(self) -> None:
        if self._turn != self._backend.turn:
            raise BackendError(
                "generation: another was started on the same engines, whose KV cache holds one at a time. "
                "Finish a stream before the next, put prompts into one batch, or load a second Pipeline"
            )
