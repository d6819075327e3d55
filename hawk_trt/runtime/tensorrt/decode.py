"""The decode step: one token a row through first_layer and decoder.

What the host gives a step lies side by side in one pinned block, and what it gets back in another, so that a
step is one copy in, two enqueues and one copy out. Where the cache is written in place, shapes stand still for
CONTEXT_STEP tokens: the first step with new shapes is enqueued plainly, which lets TensorRT settle them; the
second is captured as a CUDA graph; from then on a step is one launch.
"""

import warnings
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import TensorEntry, numpy_dtype
from hawk_trt.engine_folder import EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.protocol import DecodeInputs
from hawk_trt.runtime.tensorrt.cache import KVCache
from hawk_trt.runtime.tensorrt.cuda import Graph
from hawk_trt.runtime.tensorrt.engine import Context, resolve
from hawk_trt.runtime.tensorrt.memory import Memory, aligned, tensor_bytes, tensor_entries
from hawk_trt.stages import BIAS_KEEP, CONTEXT_LEN

# Regions of the decode step's own: inputs of first_layer that are another in a prefill.
PREFIX = "decode/"
_STEP = PREFIX + "step"
_TOKEN_BYTES = 8
# What the host gives each step.
_GIVEN = ("text_embeds", "position_ids", "write_index")


class DecodeStep:
    """The decode step, for any batch and any generation.

    Attributes:
        graph: the captured step, None before, and where it cannot be.
        captures: graphs made so far.
    """

    def __init__(
        self,
        memory: Memory,
        cache: KVCache,
        stages: tuple[Context, Context],
        manifest: EngineManifest,
        embedding_table: npt.NDArray[Any],
    ) -> None:
        """Upload what is the same in every step.

        Args:
            memory: with the regions of `sizes`.
            cache: that it reads and writes.
            stages: first_layer and decoder in their decode profiles.
            manifest: of the engines.
            embedding_table: [vocab, hidden].
        """
        self._memory, self._cache, self._stages, self._table = memory, cache, stages, embedding_table
        self._entries = {name: memory.entries[name] for name in _GIVEN if name in memory.entries}
        self._offsets = _offsets(self._entries, manifest.limits.batch)
        self._addresses = dict(memory.addresses)
        for name, offset in zip(self._entries, self._offsets, strict=False):
            self._addresses[name] = memory.addresses[_STEP] + offset
        for name, array in _constants(manifest).items():
            self._addresses[name] = memory.addresses[PREFIX + name]
            memory.upload(PREFIX + name, array)
        self._given = memory.cuda.allocate_pinned(self._offsets[-1])
        self._given.bytes[:] = 0  # of the rows that a smaller batch leaves out
        self._token = memory.cuda.allocate_pinned(manifest.limits.batch * _TOKEN_BYTES)
        self._bound: tuple[int, int] | None = None
        self._batch = 0
        self._views: dict[str, npt.NDArray[Any]] = {}
        self._can_capture = cache.inplace
        self.graph: Graph | None = None
        self.captures = 0
        memory.cuda.on_close(self.close)

    @staticmethod
    def sizes(manifest: EngineManifest) -> dict[str, int]:
        """Bytes of the regions that it needs."""
        entries = tensor_entries(manifest)
        given = {name: entries[name] for name in _GIVEN if name in entries}
        constants = {PREFIX + name: array.nbytes for name, array in _constants(manifest).items()}
        return {**constants, _STEP: _offsets(given, manifest.limits.batch)[-1]}

    def run(self, inputs: DecodeInputs) -> npt.NDArray[np.int64]:
        """One step over as many rows as there are token ids.

        Returns:
            int64 [batch], the most probable next token of each row.

        Raises:
            BackendError: TensorRT or CUDA failed.
        """
        batch = len(inputs.token_ids)
        self._give(batch, inputs)
        dims = self._cache.dims(1)
        key = (batch, dims[CONTEXT_LEN]) if self._cache.inplace else None
        if key is None or key != self._bound:
            self._bind(batch, dims)
            self._enqueue()
            self._bound = key
        else:
            if self.graph is None and self._can_capture:
                self._capture()
            if self.graph is None:
                self._enqueue()
            else:
                self.graph.launch()
        self._memory.cuda.synchronize()
        next_token: npt.NDArray[np.int64] = self._token.array((batch,), np.dtype(np.int64)).copy()
        return next_token

    def close(self) -> None:
        """Release the graph."""
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()

    def _give(self, batch: int, inputs: DecodeInputs) -> None:
        """Write the step's host inputs to the pinned block."""
        if batch != self._batch:
            self._batch = batch
            self._views = {
                name: self._given.array(resolve(entry, _dims(batch)), numpy_dtype(entry.dtype), offset)
                for (name, entry), offset in zip(self._entries.items(), self._offsets, strict=False)
            }
        self._views["text_embeds"][:] = self._table[inputs.token_ids]
        self._views["position_ids"][..., 0] = inputs.position_ids
        if self._cache.inplace:
            self._views["write_index"][:] = self._cache.length

    def _bind(self, batch: int, cache_dims: dict[str, int]) -> None:
        """Set shapes and addresses; what was captured with others is void."""
        self.close()
        self._bound = None
        dims = {**_dims(batch), "num_visual": 1, "num_kept_total": 1, **cache_dims}
        addresses = {**self._addresses, **self._cache.addresses()}
        for stage in self._stages:
            stage.bind(dims, addresses)

    def _enqueue(self) -> None:
        """Copy in, both stages, copy out: all on the stream, nothing that waits."""
        cuda = self._memory.cuda
        cuda.copy_in(self._addresses[_STEP], self._given.address, len(self._given.bytes))
        for stage in self._stages:
            stage.enqueue()
        cuda.copy_out(self._token.address, self._addresses["next_token"], self._batch * _TOKEN_BYTES)

    def _capture(self) -> None:
        """Make the graph; where TensorRT cannot be captured, say so once and go on without."""
        try:
            self.graph = self._memory.cuda.capture(self._enqueue)
            self.captures += 1
        except BackendError as error:
            self._can_capture = False
            warnings.warn(f"decode runs without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)


def _constants(manifest: EngineManifest) -> dict[str, npt.NDArray[Any]]:
    """Inputs of first_layer that are the same in every decode step, for the largest batch."""
    batch = manifest.limits.batch
    visual = [entry for entry in tensor_entries(manifest).values() if entry.shape[:1] == ("num_visual",)]
    return {
        **{entry.name: np.zeros(resolve(entry, {"num_visual": 1}), numpy_dtype(entry.dtype)) for entry in visual},
        "source_rows": -1 - np.arange(batch, dtype=np.int64)[:, None],
        "query_weights": np.zeros((batch, 1), np.float32),
        "select_bias": np.full((batch, 1), BIAS_KEEP, np.float32),
    }


def _dims(batch: int) -> dict[str, int]:
    return {"batch": batch, "seq_len": 1, "num_text": batch}


def _offsets(entries: dict[str, TensorEntry], batch: int) -> list[int]:
    """Where each input begins in the block, which is made for the largest batch; the last is the block's end."""
    return list(accumulate((aligned(tensor_bytes(entry, _dims(batch))) for entry in entries.values()), initial=0))
