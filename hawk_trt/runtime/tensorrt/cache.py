"""The KV cache on the GPU, for both targets.

tensorrt   one tensor [batch, kv_heads, context, head_dim] a layer, key and value, zeroed once; each is input and
           output of its stage at one address, write_index says where a step writes, and attention reads the first
           len(context_slots) columns
portable   two sets of tensors: a step reads the past from one and writes it, longer, to the other
"""

from typing import Any

import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.cuda import CudaDevice
from hawk_trt.runtime.tensorrt.memory import aligned
from hawk_trt.stages import CONTEXT_LEN, in_place, key_name, value_name

# Attention reads the cache in steps of so many columns: a step's shapes, and with them its CUDA graph, stay for
# as many tokens, and at most so many columns are read in vain.
CONTEXT_STEP = 256


class KVCache:
    """Keys and values of all layers, of one generation at a time.

    Attributes:
        inplace: whether steps write in place.
        context: columns that it can hold.
        length: columns written so far.
        nbytes: device memory that it takes.
        turn: counts generations; the latest one has the cache.
        checked_rows: rows whose last logits tell whether all that was written is finite; None while a step runs,
            after one that failed, and before the first.
    """

    def __init__(self, manifest: EngineManifest, address: int) -> None:
        self.inplace = in_place(manifest.target)
        self.context = manifest.limits.context
        self.length = 0
        self.turn = 0
        self.checked_rows: int | None = None
        self._side = 0
        self._manifest = manifest
        self._names, sides, slot_bytes = _layout(manifest)
        self.nbytes = self.size_bytes(manifest)
        self._sides = [
            [address + (side * len(self._names) + i) * slot_bytes for i in range(len(self._names))]
            for side in range(sides)
        ]

    @staticmethod
    def size_bytes(manifest: EngineManifest) -> int:
        """Device memory that it takes."""
        names, sides, slot_bytes = _layout(manifest)
        return sides * len(names) * slot_bytes

    def restart(self) -> None:
        """Begin a new generation; what was written stays, behind the mask."""
        self.turn += 1
        self.length = 0
        self.checked_rows = 0

    def addresses(self) -> dict[str, int]:
        """Address of every cache tensor, as input and as output."""
        past, present = self._sides[self._side], self._sides[self._side - 1]
        return {
            name: address
            for names, sources, targets in zip(self._names, past, present, strict=True)
            for name, address in zip(names, (sources, targets), strict=True)
        }

    def dims(self, columns: int) -> dict[str, int]:
        """Sizes of the cache's dimensions in a step that writes so many columns."""
        total = self.length + columns
        if not self.inplace:
            return {"past_len": self.length, "total_len": total}
        return {CONTEXT_LEN: min(-(-total // CONTEXT_STEP) * CONTEXT_STEP, self.context)}

    def read(self, cuda: CudaDevice, layer: int, batch: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, length, head_dim]."""
        language, dtype = self._manifest.bundle.language, numpy_dtype(self._manifest.bundle.dtype)
        columns = self.context if self.inplace else self.length
        shape = (batch, language.num_key_value_heads, columns, language.head_dim)
        key, value = (
            cuda.download(address, shape, dtype)[:, :, : self.length]
            for address in self._sides[self._side][2 * layer : 2 * layer + 2]
        )
        return key, value

    def advance(self, columns: int, rows: int = 0) -> None:
        """Count columns as written, into so many rows."""
        self.length += columns
        self.checked_rows = rows
        self._side = (self._side + 1) % len(self._sides)

    def check_room(self, columns: int) -> None:
        """Refuse a write beyond the end: TensorRT would drop it silently.

        Raises:
            BackendError: the cache is full.
        """
        if self.length + columns > self.context:
            raise BackendError(
                f"KV cache: got {self.length + columns} columns to hold, these engines hold {self.context}. "
                "Shorten the prompt or the answer, or rebuild with a larger --max-context: python -m engines"
            )


def _layout(manifest: EngineManifest) -> tuple[list[tuple[str, str]], int, int]:
    """Input and output name of every cache tensor, how many sets of them there are, and the bytes of one."""
    language, limits = manifest.bundle.language, manifest.limits
    layers = range(language.num_hidden_layers)
    names = [(name(layer, past=True), name(layer, past=False)) for layer in layers for name in (key_name, value_name)]
    values = limits.batch * language.num_key_value_heads * limits.context * language.head_dim
    slot_bytes = aligned(values * numpy_dtype(manifest.bundle.dtype).itemsize)
    return names, 1 if in_place(manifest.target) else 2, slot_bytes
