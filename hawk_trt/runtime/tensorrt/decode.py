"""The decode step: one token a row through first_layer and decoder.

What the host gives a step lies side by side in one pinned block, and what it gets back in another, so that a
step is one copy in, two enqueues and one copy out. Where the cache is written in place, shapes stand still for
CONTEXT_STEP tokens: the first step with new shapes is enqueued plainly, which lets TensorRT settle them; the
second is captured as a CUDA graph; from then on a step is one launch.
"""

import warnings
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import DECODE, EngineFolder, EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.protocol import DecodeInputs
from hawk_trt.runtime.tensorrt.cache import CONTEXT_LEN
from hawk_trt.runtime.tensorrt.cuda import Graph
from hawk_trt.runtime.tensorrt.engine import resolve
from hawk_trt.runtime.tensorrt.memory import aligned, tensor_bytes
from hawk_trt.stages import BIAS_KEEP, DECODER, FIRST_LAYER

if TYPE_CHECKING:
    from hawk_trt.runtime.tensorrt.backend import TensorRtBackend

# Regions of the decode step's own: inputs of first_layer that are another in a prefill.
PREFIX = "decode/"
_STEP = PREFIX + "step"
_TOKEN_BYTES = 8


class DecodeStep:
    """The decode step of a backend, for any batch and any generation.

    Attributes:
        graph: the captured step, None before, and where it cannot be.
        captures: graphs made so far.
    """

    def __init__(self, backend: "TensorRtBackend") -> None:
        manifest = backend.manifest
        self._backend = backend
        block = backend.memory.addresses[_STEP]
        self._addresses = dict(backend.memory.addresses)
        for name, offset in zip(_parts(manifest, 1), _offsets(manifest), strict=False):
            self._addresses[name] = block + offset
        for name, array in _constants(backend.engines).items():
            self._addresses[name] = backend.memory.addresses[PREFIX + name]
            backend.staging.upload(self._addresses[name], array)
        self._given = backend.cuda.allocate_pinned(_offsets(manifest)[-1])
        self._given.bytes[:] = 0  # of the rows that a smaller batch leaves out
        self._token = backend.cuda.allocate_pinned(manifest.limits.batch * _TOKEN_BYTES)
        self._bound: tuple[int, int] | None = None
        self._batch = 0
        self._views: dict[str, npt.NDArray[Any]] = {}
        self._can_capture = backend.cache.inplace
        self.graph: Graph | None = None
        self.captures = 0

    @staticmethod
    def sizes(engines: EngineFolder) -> dict[str, int]:
        """Bytes of the regions that it needs."""
        sizes = {PREFIX + name: array.nbytes for name, array in _constants(engines).items()}
        return {**sizes, _STEP: _offsets(engines.manifest)[-1]}

    def run(self, inputs: DecodeInputs) -> npt.NDArray[np.int64]:
        """One step over as many rows as there are token ids.

        Returns:
            int64 [batch], the most probable next token of each row.

        Raises:
            BackendError: TensorRT or CUDA failed.
        """
        backend = self._backend
        batch = len(inputs.token_ids)
        self._give(batch, inputs)
        dims = backend.cache.dims(1)
        key = (batch, dims[CONTEXT_LEN]) if backend.cache.inplace else None
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
        backend.cuda.synchronize()
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
            self._views = self._views_of(batch)
        views = self._views
        views["text_embeds"][:, 0] = self._backend.embedding_table[inputs.token_ids]
        views["position_ids"][..., 0] = inputs.position_ids
        views["write_index"][:] = self._backend.cache.length

    def _views_of(self, batch: int) -> dict[str, npt.NDArray[Any]]:
        """The parts of the pinned block as arrays."""
        manifest = self._backend.manifest
        return {
            name: self._given.array(shape, numpy_dtype(dtype), offset)
            for (name, (shape, dtype)), offset in zip(_parts(manifest, batch).items(), _offsets(manifest), strict=False)
        }

    def _bind(self, batch: int, cache_dims: dict[str, int]) -> None:
        """Set shapes and addresses; what was captured with others is void."""
        self.close()
        self._bound = None
        dims = {"batch": batch, "seq_len": 1, "num_visual": 1, "num_kept_total": 1, **cache_dims}
        addresses = {**self._addresses, **self._backend.cache.addresses()}
        for stage in (FIRST_LAYER, DECODER):
            self._backend.contexts[stage, DECODE].bind(dims, addresses)

    def _enqueue(self) -> None:
        """Copy in, both stages, copy out: all on the stream, nothing that waits."""
        backend = self._backend
        backend.cuda.copy_in(self._addresses[_STEP], self._given.address, len(self._given.bytes))
        for stage in (FIRST_LAYER, DECODER):
            backend.contexts[stage, DECODE].enqueue()
        backend.cuda.copy_out(self._token.address, self._addresses["next_token"], self._batch * _TOKEN_BYTES)

    def _capture(self) -> None:
        """Make the graph; where TensorRT cannot be captured, say so once and go on without."""
        try:
            self.graph = self._backend.cuda.capture(self._enqueue)
            self.captures += 1
        except BackendError as error:
            self._can_capture = False
            warnings.warn(f"decode runs without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)


def _constants(engines: EngineFolder) -> dict[str, npt.NDArray[Any]]:
    """Inputs of first_layer that are the same in every decode step, for the largest batch."""
    batch = engines.manifest.limits.batch
    visual = [entry for entry in engines.plan(FIRST_LAYER).inputs if "num_visual" in entry.shape]
    return {
        **{entry.name: np.zeros(resolve(entry, {"num_visual": 1}), numpy_dtype(entry.dtype)) for entry in visual},
        "visual_rows": np.full((batch, 1), -1, np.int64),
        "query_weights": np.zeros((batch, 1), np.float32),
        "select_bias": np.full((batch, 1), BIAS_KEEP, np.float32),
    }


def _parts(manifest: EngineManifest, batch: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what the host gives a step."""
    language = manifest.bundle.language
    return {
        "text_embeds": ((batch, 1, language.hidden_size), manifest.bundle.dtype),
        "position_ids": ((language.position_axes, batch, 1), "int64"),
        "write_index": ((batch,), "int64"),
    }


def _offsets(manifest: EngineManifest) -> list[int]:
    """Where each part begins in the block, which is made for the largest batch; the last is the block's end."""
    sizes = (aligned(tensor_bytes(shape, dtype)) for shape, dtype in _parts(manifest, manifest.limits.batch).values())
    return list(accumulate(sizes, initial=0))
