"""The decode step: one token a row through first_layer and decoder.

What the host gives a step lies side by side in one pinned block, and what it gets back in another, so that a
step is one copy in, two enqueues and one copy out. It runs over the slots of the cache from 0 to the highest that
decodes; one between them that does not writes to a column of its own that is overwritten before it counts, and sees no
other's.

Shapes stand still while as many slots decode, on the target tensorrt for CONTEXT_STEP tokens: the first step with new
shapes is enqueued plainly, which lets TensorRT settle them; the second is captured as a CUDA graph; from then on a step
is one launch, on the target portable with the copy of each slot's new column behind. A graph is only good while its
execution contexts keep their shapes, so each has two of its own, and up to MAX_GRAPHS are kept.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import TensorEntry, numpy_dtype
from hawk_trt.engine_folder import EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.cache import KVCache, Slots
from hawk_trt.runtime.tensorrt.cuda import Graph
from hawk_trt.runtime.tensorrt.engine import Context, resolve
from hawk_trt.runtime.tensorrt.memory import Memory, aligned, tensor_bytes, tensor_entries
from hawk_trt.stages import BIAS_KEEP

# Regions of the decode step's own: inputs of first_layer that are another in a prefill.
PREFIX = "decode/"
_STEP = PREFIX + "step"
_TOKEN_BYTES = 8
# What the host gives each step.
_GIVEN = ("text_embeds", "position_ids", "write_index", "kv_start")
# Of the shapes last used. Each has execution contexts, whose weights and scratch are shared.
MAX_GRAPHS = 16

# first_layer and decoder in their decode profiles.
Stages: TypeAlias = tuple[Context, Context]


@dataclass(slots=True)
class _Bound:
    """Execution contexts with shapes and addresses, and the graph that was captured of them, if any."""

    stages: Stages
    graph: Graph | None = None


class DecodeStep:
    """The decode step, for any slots; captures: graphs made so far."""

    def __init__(
        self, memory: Memory, cache: KVCache, stages: Stages, more_stages: Callable[[], Stages], table: npt.NDArray[Any]
    ) -> None:
        """Upload what is the same in every step; more_stages makes contexts like stages."""
        self._memory, self._cache, self._table = memory, cache, table
        self._spare, self._more_stages = [stages], more_stages  # bound to nothing that counts
        self._offsets, block_bytes = _offsets(memory.entries, cache.batch)
        self._addresses = dict(memory.addresses)
        for name, offset in self._offsets.items():
            self._addresses[name] = memory.addresses[_STEP] + offset
        for name, array in _constants(memory.entries, cache.batch).items():
            self._addresses[name] = memory.addresses[PREFIX + name]
            memory.upload(PREFIX + name, array)
        self._given = memory.cuda.allocate_pinned(block_bytes)
        self._token = memory.cuda.allocate_pinned(cache.batch * _TOKEN_BYTES).view(np.int64)
        self._bound: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()  # the last used is the last
        self._can_capture, self._most = True, MAX_GRAPHS
        self.captures = 0
        memory.cuda.on_close(self.close)

    @staticmethod
    def sizes(manifest: EngineManifest) -> dict[str, int]:
        """Bytes of the regions that it needs, by name."""
        entries, batch = tensor_entries(manifest), manifest.limits.batch
        constants = {PREFIX + name: array.nbytes for name, array in _constants(entries, batch).items()}
        return {**constants, _STEP: _offsets(entries, batch)[1]}

    def run(self, slots: Slots, tokens: Slots, positions: Slots) -> tuple[npt.NDArray[np.int64], int]:
        """A step of slots, or BackendError: the most probable token of each, int64 [slots], and rows it ran over."""
        rows = int(slots.max()) + 1
        self._give(rows, slots, tokens, positions)
        dims = self._cache.dims(1, self._cache.length_of(slots))
        self._run_bound(rows, dims)
        self._cache.store_token(self._memory.cuda, slots)
        self._memory.cuda.synchronize()
        return self._token[slots], rows

    def close(self) -> None:
        """Release the graphs, then the contexts that were made for them."""
        bound = list(self._bound.values())
        self._bound.clear()
        self._spare += [one.stages for one in bound]
        try:
            for one in bound:
                if one.graph is not None:
                    one.graph.close()
        finally:
            for stage in (stage for stages in self._spare for stage in stages):
                stage.close()

    def _run_bound(self, rows: int, cache_dims: dict[str, int]) -> None:
        """Enqueue or replay a step over rows and columns of attention, as far as they were seen before."""
        key = (rows, *cache_dims.values())
        bound = self._bound.get(key)
        if bound is None:
            stages = self._unbound()
            dims = {**_dims(rows), "num_visual": 1, "num_kept_total": 1, **cache_dims}
            addresses = {**self._addresses, **self._cache.addresses()}
            try:
                for stage in stages:
                    stage.bind(dims, addresses)
                self._enqueue(stages, rows)
            except BaseException:
                self._spare.append(stages)
                raise
            self._bound[key] = _Bound(stages)
            return
        self._bound.move_to_end(key)
        if bound.graph is None and self._can_capture:
            self._capture(bound, rows)
        if bound.graph is None:
            self._enqueue(bound.stages, rows)
        else:
            bound.graph.launch()

    def _unbound(self) -> Stages:
        """Execution contexts to bind: new ones, or those whose shapes were not used for longest."""
        if not self._spare and len(self._bound) < self._most:
            try:
                return self._more_stages()
            except BackendError:
                self._most = len(self._bound)  # there is no memory for more
        if not self._spare:
            _, oldest = self._bound.popitem(last=False)
            self._spare.append(oldest.stages)
            if oldest.graph is not None:
                oldest.graph.close()
        return self._spare.pop()

    def _give(self, rows: int, slots: Slots, tokens: Slots, positions: Slots) -> None:
        """Write the step's host inputs to the pinned block; what belongs to no row is 0."""
        self._given[:] = 0
        views = {}
        for name, offset in self._offsets.items():
            entry, dims = self._memory.entries[name], _dims(rows)
            content = self._given[offset : offset + tensor_bytes(entry, dims)]
            views[name] = content.view(numpy_dtype(entry.dtype)).reshape(resolve(entry, dims))
        views["text_embeds"][slots] = self._table[tokens]
        views["position_ids"][..., slots, 0] = positions
        views["kv_start"][slots] = self._cache.kv_start(slots)
        if self._cache.inplace:
            views["write_index"][:] = self._cache.next_columns(rows)

    def _enqueue(self, stages: Stages, rows: int) -> None:
        """Copy in, both stages, copy out: all on the stream, nothing that waits."""
        cuda = self._memory.cuda
        cuda.copy_in(self._addresses[_STEP], self._given)
        for stage in stages:
            stage.enqueue()
        cuda.copy_out(self._token[:rows], self._addresses["next_token"])

    def _capture(self, bound: _Bound, rows: int) -> None:
        """Make the graph; where TensorRT cannot be captured, say so once and go on without."""
        try:
            bound.graph = self._memory.cuda.capture(lambda: self._enqueue(bound.stages, rows))
            self.captures += 1
        except BackendError as error:
            self._can_capture, self._most = False, 1
            warnings.warn(f"decode runs without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)


def _constants(entries: dict[str, TensorEntry], batch: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs of first_layer that are the same in every decode step, for the largest batch."""
    visual = [entry for entry in entries.values() if entry.shape[:1] == ("num_visual",)]
    return {
        **{entry.name: np.zeros(resolve(entry, {"num_visual": 1}), numpy_dtype(entry.dtype)) for entry in visual},
        "source_rows": -1 - np.arange(batch, dtype=np.int64)[:, None],
        "query_weights": np.zeros((batch, 1), np.float32),
        "select_bias": np.full((batch, 1), BIAS_KEEP, np.float32),
    }


def _dims(batch: int) -> dict[str, int]:
    return {"batch": batch, "seq_len": 1, "num_text": batch}


def _offsets(entries: dict[str, TensorEntry], batch: int) -> tuple[dict[str, int], int]:
    """Where each input begins in the block, which is made for the largest batch; and the block's end."""
    offsets, end = {}, 0
    for name in (name for name in _GIVEN if name in entries):
        offsets[name] = end
        end += aligned(tensor_bytes(entries[name], _dims(batch)))
    return offsets, end
