"""States of linear layers on the GPU, beside the KV cache: two tensors a layer, without columns, a row for each slot.

A step reads the states of the slots where they lie, and writes new ones to memory of their own; those of the slots that
it was asked for are then copied back. So it may run over slots of others, and addresses stand still for its CUDA graph.
A prompt reads zeros.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.engine_folder import ALIGNMENT, EngineManifest
from hawk_trt.runtime.tensorrt.cuda import CudaDevice, Rows

_DTYPE = np.dtype(np.float32)


class States:
    """past_conv and past_state of all slots, nbytes from an address on; nothing where there are no linear layers."""

    def __init__(self, manifest: EngineManifest, address: int) -> None:
        self._language = language = manifest.bundle.language
        self._layers = [layer for layer in range(language.num_hidden_layers) if language.is_linear(layer)]
        self._shapes = language.linear.state_shapes if language.linear is not None else ()
        self._row_bytes = [math.prod(shape) * _DTYPE.itemsize for shape in self._shapes]
        # from one tensor to the next of its kind
        self._sizes = [-(-manifest.limits.batch * row // ALIGNMENT) * ALIGNMENT for row in self._row_bytes]
        self._zeros, end = address, address + max(self._sizes, default=0)
        self._own: list[int] = []  # of each kind, its first tensor
        self._made: list[int] = []
        for places in (self._own, self._made):
            for size in self._sizes:
                places.append(end)
                end += len(self._layers) * size
        self.nbytes = end - address

    def addresses(self, *, empty: bool) -> dict[str, int]:
        """Address of every state, as input and output of a step over the slots; empty: of a prompt."""
        found = {}
        for number, layer in enumerate(self._layers):
            names = zip(*(self._language.cache_names(layer, past=past) for past in (True, False)), strict=True)
            for (past, present), size, own, made in zip(names, self._sizes, self._own, self._made, strict=True):
                found[past] = self._zeros if empty else own + number * size
                found[present] = made + number * size
        return found

    def store(self, cuda: CudaDevice, first: int, slots: npt.NDArray[np.int64]) -> None:
        """Copy to slots what the last step left of them; first: the slot of that step's first row."""
        ordered = np.sort(slots)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):  # neighbours together
            for own, made, row, size in zip(self._own, self._made, self._row_bytes, self._sizes, strict=True):
                target, source = (start + int(slot) * row for start, slot in ((own, run[0]), (made, run[0] - first)))
                cuda.copy_rows(Rows(target, size, 1), Rows(source, size, 1), len(run) * row, 1, len(self._layers))

    def read(self, cuda: CudaDevice, layer: int, slot: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a slot's two states of a layer, float32."""
        number = self._layers.index(layer)
        conv, state = (
            cuda.download(own + number * size + slot * row_bytes, shape, _DTYPE)
            for own, size, row_bytes, shape in zip(self._own, self._sizes, self._row_bytes, self._shapes, strict=True)
        )
        return conv, state
