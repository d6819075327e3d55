"""The KV cache on the GPU, for both targets.

tensorrt   one tensor [batch, kv_heads, context, head_dim] a layer, key and value; each is input and output of its
           stage at one address, write_index says where a step writes each row, and attention reads the first
           len(context_slots) columns. Its rows are slots: a generation has some of them, others have the rest
portable   two sets of tensors: a step reads the past from one and writes it, longer, to the other. One generation
           has both

A slot is taken for a prompt, stays with whoever has it while others come and go, and is free again when it is
released or nobody refers to its generation any more. What is masked still counts with weight 0, and 0 x NaN is NaN:
a slot that may hold what is not finite is zeroed before it is taken again.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.cuda import CudaDevice
from hawk_trt.runtime.tensorrt.engine import ALIGNMENT
from hawk_trt.runtime.tensorrt.memory import aligned
from hawk_trt.stages import CONTEXT_LEN, in_place, key_name, value_name

# Attention reads the cache in steps of so many columns: a step's shapes, and with them its CUDA graph, stay for
# as many tokens, and at most so many columns are read in vain.
CONTEXT_STEP = 256

Slots = npt.NDArray[np.int64]


class KVCache:
    """Keys and values of all layers, and whose they are.

    Attributes:
        shared: whether several generations have slots of it at a time.
        context, batch: columns that a slot can hold, and slots.
        starts: int64 [batch], the first column of each slot that holds a token.
        ends: int64 [batch], where each writes next.
        finite: bool [batch], whether all that a slot holds is known to be finite.
        num_steps: prefills and decode steps so far.
    """

    def __init__(self, manifest: EngineManifest, address: int) -> None:
        limits = manifest.limits
        self.inplace = in_place(manifest.target)
        self.context, self.batch = limits.context, limits.batch
        self.starts, self.ends = np.zeros(self.batch, np.int64), np.zeros(self.batch, np.int64)
        self.finite = np.ones(self.batch, np.bool_)
        self.num_steps = 0
        self._last_step = np.zeros(self.batch, np.int64)  # of each slot
        self._owners: list[weakref.ref[object] | None] = [None] * self.batch
        self._side = 0
        self._manifest = manifest
        self._names, sides, self._tensor_bytes = _layout(manifest)
        self.row_bytes = row_bytes(manifest)
        # a prefill binds the cache from its first slot on, and TensorRT takes aligned addresses alone
        self.shared = self.inplace and self.row_bytes % ALIGNMENT == 0
        self.nbytes = self.size_bytes(manifest)
        self._sides = [
            [address + (side * len(self._names) + i) * self._tensor_bytes for i in range(len(self._names))]
            for side in range(sides)
        ]

    @staticmethod
    def size_bytes(manifest: EngineManifest) -> int:
        """Of device memory."""
        names, sides, tensor_bytes = _layout(manifest)
        return sides * len(names) * tensor_bytes

    # -- whose a slot is

    @property
    def most_together(self) -> int:
        """The most neighbouring slots that are free; one where none is, since `find` then ends a generation."""
        if not self.shared:
            return self.batch
        return max((n for n in range(1, self.batch + 1) if self._free_from(n) is not None), default=1)

    def find(self, batch: int) -> Slots:
        """Neighbouring slots for so many prompts, the first that are free; generations end where there are none.

        Those end first whose last step is longest ago. Without sharing all end.

        Raises:
            BackendError: more than there are slots.
        """
        if batch > self.batch:
            raise BackendError(
                f"batch: got {batch} prompts side by side, these engines were built for {self.batch}. "
                f"Rebuild with a larger --batch: {self._manifest.rebuild}"
            )
        if not self.shared:
            self.release(range(self.batch))
        while (first := self._free_from(batch)) is None:
            taken = [slot for slot in range(self.batch) if self._owner(slot) is not None]
            ended = self._owner(min(taken, key=lambda slot: self._last_step[slot]))
            self.release(slot for slot in taken if self._owner(slot) is ended)
        slots: Slots = np.arange(first, first + batch)
        self.starts[slots] = self.ends[slots] = 0
        self._last_step[slots] = self.num_steps
        return slots

    def give(self, slots: Slots, owner: object) -> None:
        """Let slots belong to a generation, whoever had them; the cache itself keeps no generation alive."""
        for slot in slots:
            self._owners[slot] = weakref.ref(owner)

    def release(self, slots: Iterable[int]) -> None:
        """Let others have slots."""
        for slot in slots:
            self._owners[slot] = None

    def belong(self, slots: Slots, owner: object) -> bool:
        """Whether all these slots belong to a generation."""
        return all(self._owner(slot) is owner for slot in slots)

    def clear(self, cuda: CudaDevice, slots: Slots) -> None:
        """Zero neighbouring slots in all layers, where they may hold what is not finite; others keep what they hold.

        What is written to a free slot, its first column, every prefill overwrites.
        """
        if not self.inplace or self.finite[slots].all():
            return
        if self.shared:
            address = self._sides[0][0] + int(slots[0]) * self.row_bytes
            cuda.zero_each(address, self._tensor_bytes, len(slots) * self.row_bytes, len(self._names))
        else:
            cuda.zero(self._sides[0][0], self.nbytes)

    # -- a step

    def begin_step(self, slots: Slots) -> int:
        """Count a step over slots, whose values are not known to be finite until it has ended; returns its number."""
        self.num_steps += 1
        self._last_step[slots] = self.num_steps
        self.finite[slots] = False
        return self.num_steps

    def addresses(self, first: int = 0) -> dict[str, int]:
        """Address of every cache tensor, as input and as output, from a slot on."""
        past, present = self._sides[self._side], self._sides[self._side - 1]
        offset = first * self.row_bytes
        return {
            name: address + offset
            for names, sources, targets in zip(self._names, past, present, strict=True)
            for name, address in zip(names, (sources, targets), strict=True)
        }

    def dims(self, columns: int, length: int) -> dict[str, int]:
        """Sizes of the cache's dimensions in a step that writes so many columns behind the longest slot's length."""
        total = length + columns
        if not self.inplace:
            return {"past_len": length, "total_len": total}
        return {CONTEXT_LEN: min(-(-total // CONTEXT_STEP) * CONTEXT_STEP, self.context)}

    def length_of(self, slots: Slots) -> int:
        """Columns written so far, in the longest of these slots."""
        return int(self.ends[slots].max())

    def read(self, cuda: CudaDevice, layer: int, slots: Slots) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [slots, kv_heads, length, head_dim], to the longest one's end."""
        language, dtype = self._manifest.bundle.language, numpy_dtype(self._manifest.bundle.dtype)
        length = self.length_of(slots)
        shape = (len(slots), language.num_key_value_heads, length, language.head_dim)
        tensors = self._sides[self._side][2 * layer : 2 * layer + 2]
        if not self.inplace:  # slots are the first ones, with as many columns as are written
            key, value = (cuda.download(address, shape, dtype) for address in tensors)
            return key, value
        row = (shape[1], self.context, shape[3])
        key, value = (
            np.stack([cuda.download(address + int(slot) * self.row_bytes, row, dtype)[:, :length] for slot in slots])
            for address in tensors
        )
        return key, value

    def advance(self, columns: int, slots: Slots) -> None:
        """Count columns as written to slots."""
        self.ends[slots] += columns
        self._side = (self._side + 1) % len(self._sides)

    def check_room(self, columns: int, slots: Slots) -> None:
        """Refuse a write beyond the end: TensorRT would drop it silently.

        Raises:
            BackendError: a slot is full.
        """
        length = self.length_of(slots)
        if length + columns > self.context:
            raise BackendError(
                f"KV cache: got {length + columns} columns to hold, these engines hold {self.context}. "
                "Shorten the prompt or the answer, or rebuild with a larger --max-context: python -m engines"
            )

    def _owner(self, slot: int) -> object | None:
        reference = self._owners[slot]
        return None if reference is None else reference()

    def _free_from(self, batch: int) -> int | None:
        """The first of so many neighbouring free slots."""
        free = [self._owner(slot) is None for slot in range(self.batch)]
        return next((first for first in range(self.batch - batch + 1) if all(free[first : first + batch])), None)


def row_bytes(manifest: EngineManifest) -> int:
    """Bytes of a slot in one tensor."""
    language = manifest.bundle.language
    values = language.num_key_value_heads * manifest.limits.context * language.head_dim
    return values * numpy_dtype(manifest.bundle.dtype).itemsize


def _layout(manifest: EngineManifest) -> tuple[list[tuple[str, str]], int, int]:
    """Input and output name of every cache tensor, how many sets of them there are, and the bytes of one."""
    layers = range(manifest.bundle.language.num_hidden_layers)
    names = [(name(layer, past=True), name(layer, past=False)) for layer in layers for name in (key_name, value_name)]
    return names, 1 if in_place(manifest.target) else 2, aligned(manifest.limits.batch * row_bytes(manifest))
