"""The KV cache on the GPU, for both targets.

tensorrt   one tensor [batch, kv_heads, context, head_dim] a layer, key and value; each is input and output of its
           stage at one address, write_index says where a step writes each row, and attention reads the first
           len(context_slots) columns. Its rows are slots, one for each prompt or answer under way
portable   the past [batch, kv_heads, columns, head_dim] is an input, and the output is the new columns alone, which are
           copied into it. Attention does not care for the order of columns, and kv_start hides those before it; so the
           tokens of a slot end at the past's last column: the prompt's in order, then each new one before all others.
           A prompt's output lies in its slots' own memory at first, and is spread there through room for one tensor

Linear layers have states instead: states.py.

A slot is taken for a prompt, stays with its row while others come and go, and is free again when the row is released
or nobody refers to it any more. What is masked still counts with weight 0, and 0 x NaN is NaN:
a slot that may hold what is not finite is zeroed before it is taken again.
"""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.engine_folder import ALIGNMENT, EngineManifest
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.cuda import CudaDevice, Rows
from hawk_trt.runtime.tensorrt.memory import Memory
from hawk_trt.runtime.tensorrt.states import States
from hawk_trt.stages import CONTEXT_LEN, in_place

# Attention reads the cache in steps of so many columns: a step's shapes, and with them its CUDA graph, stay for
# as many tokens, and at most so many columns are read in vain.
CONTEXT_STEP = 256

Slots = npt.NDArray[np.int64]


class KVCache:
    """Keys and values of all layers from an address of device memory on, and whose they are.

    context, batch: columns that a slot can hold, and slots.  starts, ends: int64 [batch], padding before each slot's
    first token; padding and tokens.  finite: whether all in a slot is known to be finite.  owners: the row that has a
    slot, as long as something else refers to it.
    """

    def __init__(self, manifest: EngineManifest, address: int) -> None:
        limits = manifest.limits
        self.inplace = in_place(manifest.target)
        self.context, self.batch = limits.context, limits.batch
        self.starts, self.ends = np.zeros(self.batch, np.int64), np.zeros(self.batch, np.int64)
        self.finite = np.ones(self.batch, np.bool_)
        self.num_steps = 0
        self.owners: weakref.WeakValueDictionary[int, TensorRtRow] = weakref.WeakValueDictionary()
        self._prefilled = np.zeros(self.batch, np.int64)  # of each slot's tokens
        self._manifest = manifest
        language = manifest.bundle.language
        self._names = [  # input and output of every tensor of keys or values
            names
            for layer in range(language.num_hidden_layers)
            if not language.is_linear(layer)
            for names in zip(*(language.cache_names(layer, past=past) for past in (True, False)), strict=True)
        ]
        self._column_bytes, self._heads = column_bytes(manifest), language.num_key_value_heads
        self.row_bytes = self._heads * self.context * self._column_bytes  # of a slot in one tensor
        self._tensor_bytes, beside = tensor_bytes(manifest, self.context), 0 if self.inplace else 1
        self._past = address
        self._new = address + len(self._names) * self._tensor_bytes  # a portable step's columns
        self._room = self._new + beside * len(self._names) * tensor_bytes(manifest, 1)  # for a portable prompt's tensor
        self._states = States(manifest, self._room + beside * self._tensor_bytes)
        self.nbytes = self._room + beside * self._tensor_bytes - address + self._states.nbytes

    # -- whose a slot is

    @property
    def most_together(self) -> int:
        """The most neighbouring slots that are free, else one: `find` ends a row."""
        return max((n for n in range(1, self.batch + 1) if self._free_from(n) is not None), default=1)

    def find(self, batch: int) -> Slots:
        """Neighbouring slots for so many prompts, the first that are free; rows end where there are none.

        Those end first whose last step is longest ago. BackendError for more prompts than there are slots.
        """
        if batch > self.batch:
            raise BackendError(
                f"batch: got {batch} prompts side by side, these engines were built for {self.batch}. "
                f"Rebuild with a larger --batch: {self._manifest.rebuild}"
            )
        while (first := self._free_from(batch)) is None:
            rows = list(self.owners.values())
            oldest = min(row.step for row in rows)
            for row in rows:
                if row.step == oldest:
                    row.release()
        slots: Slots = np.arange(first, first + batch)
        self.starts[slots] = self.ends[slots] = 0
        return slots

    def prepare(self, cuda: CudaDevice, slots: Slots) -> None:
        """Let nothing in neighbouring slots be what is not finite.

        What is written to a free slot, its first column, every prefill overwrites; to another's, its next step.
        """
        if not self.finite[slots].all():
            first = self._past + int(slots[0]) * self.row_bytes
            cuda.zero_each(first, self._tensor_bytes, len(slots) * self.row_bytes, len(self._names))

    # -- a step

    def begin_step(self, slots: Slots) -> None:
        """Count a step over slots, whose values are not known to be finite until it has ended."""
        self.num_steps += 1
        self.finite[slots] = False

    def look_at(self, slots: Slots, logits: npt.NDArray[np.float32] | None) -> None:
        """Logits of a step, where they were read, have seen all that its slots hold."""
        if logits is not None:
            self.finite[slots] = np.isfinite(logits).all(axis=1)

    def addresses(self, first: int | None = None) -> dict[str, int]:
        """Address of every cache tensor, as input and output: of a prefill from a slot on; None: of a decode step."""
        past = (self._past + (first or 0) * self.row_bytes, self._tensor_bytes)
        present = past if self.inplace else (self._new, tensor_bytes(self._manifest, 1))
        if first is not None:  # whose portable past is empty
            past, present = present, past
        return self._states.addresses(empty=first is not None) | {
            name: start + index * size
            for index, names in enumerate(self._names)
            for name, (start, size) in zip(names, (past, present), strict=True)
        }

    def dims(self, columns: int, length: int) -> dict[str, int]:
        """Sizes of the cache's dimensions in a step that writes so many columns behind the longest slot's length."""
        if not self.inplace:
            return {"past_len": self.context if length else 0}
        return {CONTEXT_LEN: min(-(-(length + columns) // CONTEXT_STEP) * CONTEXT_STEP, self.context)}

    def kv_start(self, slots: "Slots | int") -> npt.NDArray[np.int64]:
        """The first column of each slot that a decode step sees."""
        return self.starts[slots] if self.inplace else self.context - (self.ends - self.starts)[slots]

    def next_columns(self, rows: int) -> npt.NDArray[np.int64]:
        """Where a step over the first slots writes: behind the end of each that has an owner, else its first column."""
        taken = np.array([slot in self.owners for slot in range(rows)])
        return np.where(taken, np.minimum(self.ends[:rows], self.context - 1), 0)

    def store_prompt(self, cuda: CudaDevice, slots: Slots, columns: int) -> None:
        """Bring the columns of a portable prompt from the start of its slots' memory to their place; before they count.

        Old and new place overlap, so each tensor goes through a copy. States are copied to their slots for any target.
        """
        self._states.store(cuda, int(slots[0]), slots)
        if self.inplace:
            return
        self._prefilled[slots] = columns - self.starts[slots]
        heads = self._heads
        for tensor in range(len(self._names)):
            start = self._past + tensor * self._tensor_bytes
            made = start + int(slots[0]) * self.row_bytes
            cuda.copy(self._room, made, len(slots) * heads * columns * self._column_bytes)
            for number, slot in enumerate(slots.tolist()):
                count = int(self._prefilled[slot])
                cuda.copy_rows(
                    self._place(start, slot, self.context, self.context - count),
                    self._place(self._room, number, columns, columns - count),
                    count * self._column_bytes,
                    heads,
                    1,
                )

    def store_token(self, cuda: CudaDevice, slots: Slots) -> None:
        """Copy what a decode step made, before it counts: states, a portable column before all others of its slot."""
        self._states.store(cuda, 0, slots)
        for slot in [] if self.inplace else slots.tolist():
            cuda.copy_rows(
                self._place(self._past, slot, self.context, int(self.kv_start(slot)) - 1),
                self._place(self._new, slot, 1, 0),
                self._column_bytes,
                self._heads,
                len(self._names),
            )

    def _place(self, start: int, slot: int, columns: int, column: int) -> Rows:
        """The heads of a slot, from a column on, in all tensors."""
        pitch = columns * self._column_bytes
        address = start + slot * self._heads * pitch + column * self._column_bytes
        return Rows(address, pitch, tensor_bytes(self._manifest, columns) // pitch)

    def length_of(self, slots: Slots) -> int:
        """Columns written so far, in the longest of these slots."""
        return int(self.ends[slots].max())

    def read(self, cuda: CudaDevice, layer: int, slot: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a slot's keys and values of a layer: [kv_heads, length, head_dim], or of its two states."""
        if self._manifest.bundle.language.is_linear(layer):
            return self._states.read(cuda, layer, slot)
        language, dtype = self._manifest.bundle.language, numpy_dtype(self._manifest.bundle.dtype)
        tensor = [past for past, _ in self._names].index(language.cache_names(layer, past=True)[0])
        shape = (language.num_key_value_heads, self.context, language.head_dim)
        start, end, prefilled = (int(numbers[slot]) for numbers in (self.starts, self.ends, self._prefilled))
        columns = np.arange(end)
        if not self.inplace:
            first, new = self.context - prefilled, end - start - prefilled  # each new one is before all others
            columns = np.r_[np.zeros(start, np.int64), first : self.context, first - 1 : first - 1 - new : -1]
        place = self._past + slot * self.row_bytes + tensor * self._tensor_bytes
        key, value = (cuda.download(place + part * self._tensor_bytes, shape, dtype)[:, columns] for part in (0, 1))
        return key, value

    def check_room(self, columns: int, slots: Slots) -> None:
        """Refuse, as a BackendError, a write beyond the end: TensorRT would drop it silently."""
        length = self.length_of(slots)
        if length + columns > self.context:
            raise BackendError(
                f"KV cache: got {length + columns} columns to hold, these engines hold {self.context}. "
                "Shorten the prompt or the answer, or rebuild with a larger --max-context: python -m engines"
            )

    def _free_from(self, batch: int) -> int | None:
        """The first of so many neighbouring free slots."""
        free = [slot not in self.owners for slot in range(self.batch)]
        return next((first for first in range(self.batch - batch + 1) if all(free[first : first + batch])), None)


class TensorRtRow:
    """A slot of the cache, until it is released, another prompt takes it, or a step over it fails; step: its last."""

    def __init__(self, memory: Memory, cache: KVCache, slot: int) -> None:
        self.slot, self.step = slot, cache.num_steps
        self._memory, self._cache = memory, cache
        self._number = self._kept = 0  # its row of the last step's outputs, positions in them
        cache.owners[slot] = self

    @property
    def nbytes(self) -> int:
        """Bytes of its slot, with its share of what a portable step takes."""
        return self._cache.nbytes // self._cache.batch

    def release(self) -> None:
        if self._cache.owners.get(self.slot) is self:
            del self._cache.owners[self.slot]

    def hidden_states(self) -> npt.NDArray[np.float32]:
        self.check()
        if self.step != self._cache.num_steps:
            raise BackendError("hidden_states: another generation's step has overwritten them; read them before it")
        with self._memory.cuda.active():
            dims = {"batch": self._number + 1, "num_kept_total": self._kept}
            states: npt.NDArray[np.float32] = self._memory.read("hidden_states", dims)[self._number].astype(np.float32)
        return states

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        self.check()
        with self._memory.cuda.active():
            return self._cache.read(self._memory.cuda, layer, self.slot)

    def check(self) -> None:
        """Refuse, as a BackendError, a row that has lost its slot."""
        if self._cache.owners.get(self.slot) is not self:
            raise BackendError(
                "generation: another was started on the same engines and has its place in the KV cache, or a step "
                "failed. Finish a stream before the next, put prompts into one batch, or load a second Pipeline"
            )

    def advance(self, number: int, columns: int) -> None:
        """Count a step that wrote so many columns, and in which it was the row of this number."""
        self.step, self._number, self._kept = self._cache.num_steps, number, columns
        self._cache.ends[self.slot] += columns


def column_bytes(manifest: EngineManifest) -> int:
    """Bytes of one head of one token in one tensor."""
    return manifest.bundle.language.head_dim * numpy_dtype(manifest.bundle.dtype).itemsize


def tensor_bytes(manifest: EngineManifest, columns: int) -> int:
    """Bytes from one tensor to the next, of so many columns: a whole number of heads, and of aligned addresses."""
    heads, column = manifest.limits.batch * manifest.bundle.language.num_key_value_heads, column_bytes(manifest)
    multiple = ALIGNMENT // math.gcd(column, ALIGNMENT)
    return -(-heads // multiple) * multiple * columns * column
