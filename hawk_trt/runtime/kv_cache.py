"""KV caches in ONNX Runtime: slots, which rows take and leave; and which cache a row gets.

On a GPU caches are shared: a prompt takes free slots beside those that run, a cache outlives its rows, and its columns
are whole steps of _COLUMN_STEP. So tensors stay at their addresses, which a captured decode step needs, and
rows come and go without a copy. On the CPU every column costs time: a cache has the rows and columns that were asked
for, and is gone with them.

A cache is a tensor [slots, kv_heads, columns, head_dim] a layer, key and value.

in place   each is input and output of its stage at one address, and write_index says where a step writes
portable   each is an input, and a step returns its new columns, which are copied into place here. Attention does not
           care for the order of columns, and kv_start hides those before it: the tokens of a slot end at the last
           column, the prompt's in order, then each new one before all others. A prompt's columns are made at the start
           of its slots' own memory, so that they exist once
states     of linear layers: [slots, ...] a tensor, without columns; a step replaces a row's states by new ones

With target cpu a step writes states over those that it read. A portable step writes them beside, since several
operators read the old ones. So does a step in a shared cache: it also runs over slots of others, and the run in which
ONNX Runtime captures a CUDA graph computes it more than once, which changes no key and no value, but would change
states. Then the two memories change places, each with decode steps of its own; where others have slots in the cache,
the states of the rows that were asked for are copied instead.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.bundle import TensorEntry
from hawk_trt.errors import BackendError
from hawk_trt.runtime.session import DecodeStep, Stage, Values, download, write
from hawk_trt.stages import DECODER, FIRST_LAYER, in_place

# Memory-efficient attention of ONNX Runtime asks for multiples of 4 or 8; captured steps are few where sizes are few.
_COLUMN_STEP = 256
# An idle cache serves a prompt unless it has so many times the columns, all of which attention would read.
_MOST_EXCESS = 4


class KVCache:
    """Keys and values of all layers in some slots of so many columns, and the states of linear layers.

    starts: int64 [slots], columns of padding before each row's tokens, of the columns of a prefill.  ends: int64
    [slots], padding and tokens of each row; in place it writes there next.  free: slots that no row has.  steps: decode
    steps bound to this cache, by their rows; of states that change places, those of now.
    """

    def __init__(self, stages: Mapping[str, Stage], slots: int, columns: int, *, shared: bool) -> None:
        """Make a cache without tensors: `fill` makes them, or `carry` one by one."""
        self.slots, self.columns = slots, columns
        self.starts, self.ends, self._prompt_ends = np.zeros((3, slots), np.int64)
        self.free = set(range(slots))
        self.steps: dict[int, DecodeStep] = {}
        self._other_steps: dict[int, DecodeStep] = {}  # for when the states have changed places
        self._stages, self._shared = stages, shared
        self.in_place = in_place(stages[FIRST_LAYER].entry.target)
        # a step also writes to slots that it is not asked for; in a shared cache that is behind all that counts
        self._width = columns + (shared and self.in_place)
        self._names: dict[str, list[tuple[str, str]]] = {}  # by stage, the input and output of each tensor
        self._specs: dict[str, TensorEntry] = {}  # by the name of the output
        for stage in (FIRST_LAYER, DECODER):
            entry = stages[stage].entry
            pasts = [spec.name for spec in entry.inputs if "." in spec.name]
            presents = [spec for spec in entry.outputs if "." in spec.name]
            self._names[stage] = [(past, spec.name) for past, spec in zip(pasts, presents, strict=True)]
            self._specs |= {spec.name: spec for spec in presents}
        self._tensors: dict[str, ort.OrtValue] = {}  # by the name of the output
        self._made: dict[str, ort.OrtValue] = {}  # states as the last run wrote them, where that is beside the old
        self._used: set[int] = set()  # slots that hold what a row left

    def fill(self) -> None:
        """Make its tensors, of zeros."""
        for present in self._specs:
            self._make(present)

    def _make(self, present: str) -> None:
        self._tensors[present] = self._zeros(present, self.slots)
        if self._is_state(present) and (self._shared or not self.in_place):
            self._made[present] = self._zeros(present, self.slots)

    @property
    def is_idle(self) -> bool:
        """Whether no row has any of its slots."""
        return len(self.free) == self.slots

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot."""
        tensors = (*self._tensors.values(), *self._made.values())
        whole: int = sum(tensor.tensor_size_in_bytes() for tensor in tensors)
        return whole // self.slots

    def find(self, count: int) -> range | None:
        """Neighbouring free slots, None where there are none."""
        places = (range(first, first + count) for first in range(self.slots - count + 1))
        return next((slots for slots in places if self.free.issuperset(slots)), None)

    def take(self, slots: Iterable[int]) -> None:
        """Take free slots and empty them: a masked NaN would spoil what attention sums, and states begin as zeros."""
        taken = set(slots)
        self.free -= taken
        zeros: dict[tuple[str, tuple[int, ...]], ort.OrtValue] = {}  # one of each kind, not one a layer
        for present in self._specs if taken & self._used else ():
            kind = (self._specs[present].dtype, self._row_shape(present))
            if kind not in zeros:
                zeros[kind] = self._zeros(present, 1)
            for slot in taken & self._used:
                write(self._rows(self._tensors, present, slot, 1), zeros[kind])
        self._used |= taken

    def give_back(self, slot: int) -> None:
        """Free a slot; a step that runs over it meanwhile writes to its first column."""
        self.starts[slot] = self.ends[slot] = 0
        self.free.add(slot)

    def inputs(self, stage: str, first: int, count: int, *, empty: bool = False) -> dict[str, ort.OrtValue]:
        """Some neighbouring slots as inputs of a stage; empty: for a prompt, whose portable past is nothing."""
        if empty and not self.in_place:
            return {past: self._zeros(present, count, 0) for past, present in self._names[stage]}
        return {past: self._rows(self._tensors, present, first, count) for past, present in self._names[stage]}

    def outputs(self, stage: str, first: int, count: int, columns: int | None = None) -> dict[str, ort.OrtValue]:
        """The same memory as outputs of a stage: of a prompt of so many columns, or None of a step.

        A portable step has none for keys and values: it writes them to memory of its own.
        """
        written = self._tensors | self._made
        names = [name for _, name in self._names[stage] if self.in_place or columns is not None or name in self._made]
        width = None if self.in_place else columns
        return {present: self._rows(written, present, first, count, width) for present in names}

    def settle(self, slots: Iterable[int]) -> None:
        """After both stages: their states of these slots are what the next run reads; others keep their own."""
        if not self._made:
            return
        taken = set(slots)
        if not set(range(self.slots)) - self.free - taken:
            read = {present: self._tensors[present] for present in self._made}
            self._tensors |= self._made
            self._made = read
            self.steps, self._other_steps = self._other_steps, self.steps
            return
        for present in self._made:
            for slot in taken:
                row = self._rows(self._made, present, slot, 1)
                write(self._rows(self._tensors, present, slot, 1), row)

    def first_columns(self) -> npt.NDArray[np.int64]:
        """The first column of each slot that holds a token."""
        return self.starts if self.in_place else self.columns - (self.ends - self.starts)

    def add_prompt(self, slots: list[int], starts: npt.NDArray[np.int64], end: int, made: Values) -> None:
        """Count what a prefill wrote, or copy it into place; starts: columns of padding before each row's tokens."""
        self.starts[slots], self.ends[slots], self._prompt_ends[slots] = starts, end, end
        for present, own in self._copied():
            place = self._stages[FIRST_LAYER].device
            packed = place.empty(tuple(made[present].shape()), self._specs[present].dtype)
            write(packed, made[present])  # whose memory is the slots'
            for row, (slot, start) in enumerate(zip(slots, starts.tolist(), strict=True)):
                self._copy(own, slot, packed, row, start, end - start)

    def add_tokens(self, slots: list[int], made: Values) -> None:
        """Count a column that a decode step wrote in each of some slots, or copy it into place."""
        self.ends[slots] += 1
        for present, own in self._copied():
            for slot in slots:
                self._copy(own, slot, made[present], slot, 0, 1)

    def _copied(self) -> list[tuple[str, ort.OrtValue]]:
        """Keys and values that a step leaves beside the cache, by the name of the output."""
        return [] if self.in_place else [item for item in self._tensors.items() if not self._is_state(item[0])]

    def read(self, layer: int, slot: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a slot's keys and values of a layer, [kv_heads, length, head_dim], or of its two states."""
        one, other = (download(tensor)[slot] for tensor in self.tensors(layer))
        if any(self._is_state(name) for name in self._specs if name.endswith(f".{layer}")):
            return one, other
        start, end, prompt_end = (int(ends[slot]) for ends in (self.starts, self.ends, self._prompt_ends))
        columns = np.arange(end)
        if not self.in_place:
            first, new = self.columns - (prompt_end - start), end - prompt_end  # each new one is before all others
            columns = np.r_[np.zeros(start, np.int64), first : self.columns, first - 1 : first - 1 - new : -1]
        return one[:, columns], other[:, columns]

    def tensors(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """A layer's keys and values, or its two states, of all slots."""
        first, second = (name for name in self._specs if name.endswith(f".{layer}"))
        return self._tensors[first], self._tensors[second]

    def step(self, count: int) -> DecodeStep:
        """The decode step over the first slots."""
        if count not in self.steps:
            caches = {name: (self.inputs(name, 0, count), self.outputs(name, 0, count)) for name in self._names}
            self.steps[count] = DecodeStep(self._stages, count, caches)
        return self.steps[count]

    def forget_steps(self) -> None:
        """Let go of all that holds on to its tensors, or replays with their addresses."""
        for steps in (self.steps, self._other_steps):
            for step in steps.values():
                step.forget_graphs()
            steps.clear()

    def check_room(self, slots: list[int]) -> None:
        """Refuse, as a BackendError, to write beyond the end."""
        needed = int(self.ends[slots].max()) + 1
        if needed > self.columns:
            raise BackendError(
                f"KV cache: got {needed} columns to hold, expected at most {self.columns}; "
                "start the generation with a larger max_new_tokens"
            )

    def carry(self, parts: "list[tuple[KVCache, int]]", slots: list[int], spent: "list[KVCache]") -> None:
        """Copy rows of other caches into slots of this one, tensor by tensor, on the device.

        parts: a cache and a row of it, for each slot.  spent: caches of which nothing else is in use: they give each
        tensor up as soon as it was copied.
        """
        for slot, (source, row) in zip(slots, parts, strict=True):
            padding = source.starts[row]
            self.starts[slot] = 0
            self.ends[slot], self._prompt_ends[slot] = source.ends[row] - padding, source._prompt_ends[row] - padding
        for source in spent:
            source.forget_steps()
        for present in self._specs:
            if present not in self._tensors:
                self._make(present)
            for (source, row), slot in zip(parts, slots, strict=True):
                if self._is_state(present):
                    state = source._rows(source._tensors, present, row, 1)
                    write(self._rows(self._tensors, present, slot, 1), state)
                else:
                    start, length = int(source.first_columns()[row]), int(self.ends[slot])
                    self._copy(self._tensors[present], slot, source._tensors[present], row, start, length)
            for source in spent:
                del source._tensors[present]
                source._made.pop(present, None)

    def _copy(self, own: ort.OrtValue, slot: int, source: ort.OrtValue, row: int, start: int, length: int) -> None:
        """Copy columns of a row to the first columns of a slot."""
        if self._stages[FIRST_LAYER].device.kind == "cpu":
            first = int(self.first_columns()[slot])
            own.numpy()[slot, :, first : first + length] = source.numpy()[row, :, start : start + length]
        else:
            self._copy_by_heads(own, slot, source, row, start, length)

    def _copy_by_heads(
        self, own: ort.OrtValue, slot: int, source: ort.OrtValue, row: int, start: int, length: int
    ) -> None:
        """The same on the device, where the columns of a head lie side by side."""
        first, view = int(self.first_columns()[slot]), self._stages[FIRST_LAYER].view
        _, heads, columns, dim = own.shape()
        width = source.shape()[2]
        for head in range(heads if length else 0):
            at = ((slot * heads + head) * columns + first) * dim
            there = ((row * heads + head) * width + start) * dim
            write(view(own, at, (length, dim)), view(source, there, (length, dim)))

    def _rows(self, tensors: Values, present: str, first: int, count: int, columns: int | None = None) -> ort.OrtValue:
        """Neighbouring slots; columns: instead of theirs, so many of each from the start of the memory on."""
        if count == self.slots and columns is None:
            return tensors[present]
        start, shape = first * math.prod(self._row_shape(present)), self._row_shape(present, columns)
        return self._stages[FIRST_LAYER].view(tensors[present], start, (count, *shape))

    def _zeros(self, present: str, count: int, width: int | None = None) -> ort.OrtValue:
        shape = (count, *self._row_shape(present, width))
        return self._stages[FIRST_LAYER].device.zeros(shape, self._specs[present].dtype)

    def _row_shape(self, present: str, width: int | None = None) -> tuple[int, ...]:
        """Of so many columns, None for the cache's own."""
        width = self._width if width is None else width
        return tuple(width if isinstance(size, str) else size for size in self._specs[present].shape[1:])

    def _is_state(self, present: str) -> bool:
        return not any(isinstance(size, str) for size in self._specs[present].shape[1:])


class CachePool:
    """The caches of a backend; shared: whether prompts of different prefills share them."""

    def __init__(self, stages: Mapping[str, Stage], *, shared: bool) -> None:
        self.shared = shared
        self._stages = stages
        self._caches: list[KVCache] = []  # shared ones, in use or idle

    def take(self, count: int, columns: int) -> tuple[KVCache, list[int]]:
        """Empty slots side by side."""
        for cache in self._caches:
            excess = cache.is_idle and cache.columns > max(_MOST_EXCESS * columns, _COLUMN_STEP)
            slots = None if cache.columns < columns or excess else cache.find(count)
            if slots is not None:
                break
        else:
            cache, slots = self._new(count, columns), range(count)
            cache.fill()
        cache.take(slots)
        return cache, list(slots)

    def gather(self, parts: list[tuple[KVCache, int]], columns: int) -> tuple[KVCache, list[int]]:
        """Rows of several caches in one, and their slots: in the largest where the others fit in, else in a new one."""
        for cache in sorted({id(cache): cache for cache, _ in parts}.values(), key=lambda cache: -cache.slots):
            guests = [number for number, (home, _) in enumerate(parts) if home is not cache]
            if self.shared and cache.columns >= columns and len(guests) <= len(cache.free):
                slots = [row for _, row in parts]
                break
        else:
            guests, slots = list(range(len(parts))), list(range(len(parts)))
            cache = self._new(len(parts), columns)
        moved, places = [parts[number] for number in guests], sorted(cache.free)[: len(guests)]
        for number, place in zip(guests, places, strict=True):
            slots[number] = place
        cache.take(places)
        homes = {id(home): home for home, _ in moved}.values()
        spent = [home for home in homes if home.slots - len(home.free) == sum(other is home for other, _ in moved)]
        self._caches = [home for home in self._caches if home not in spent]
        cache.carry(moved, places, spent)
        for home, row in moved:
            home.give_back(row)
        return cache, slots

    def give_back(self, places: list[tuple[KVCache, int]]) -> None:
        """Free slots, and forget where they were. Of the caches that nobody uses only the largest stays."""
        for cache, slot in places:
            cache.give_back(slot)
        places.clear()
        idle = sorted((c for c in self._caches if c.is_idle), key=lambda c: c.slots * c.columns)
        self._drop(idle[:-1])

    def close(self) -> None:
        """Let go of all caches."""
        self._drop(list(self._caches))

    def _new(self, slots: int, columns: int) -> KVCache:
        if not self.shared:
            return KVCache(self._stages, slots, columns, shared=False)
        self._drop([cache for cache in self._caches if cache.is_idle])
        columns = -(-(columns + 1) // _COLUMN_STEP) * _COLUMN_STEP - 1
        cache = KVCache(self._stages, slots, columns, shared=True)
        self._caches.append(cache)
        return cache

    def _drop(self, caches: list[KVCache]) -> None:
        for cache in caches:
            cache.forget_steps()
            self._caches.remove(cache)
