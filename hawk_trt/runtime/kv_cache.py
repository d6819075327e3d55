"""KV caches in ONNX Runtime: slots for rows, which generations take and leave, and the decode steps over them.

in place   a tensor [slots, kv_heads, columns, head_dim] a layer, key and value; each is input and output of its stage
           at one address, and write_index says where a step writes
portable   every step returns a longer cache, which is the next step's input: a cache has the rows of one generation
states     of linear layers: [slots, ...] a tensor, without columns; a step replaces a row's states by new ones

On a GPU caches are shared: a prompt takes free slots beside those that run, a cache outlives its generations, and its
columns are whole steps of _COLUMN_STEP. So tensors stay at their addresses, which a captured decode step needs, and
rows come and go without a copy. On the CPU every column costs time: a cache has the rows and columns that were asked
for, and is gone with them.

On the CPU a step writes states over those that it read. In a shared cache it writes them beside, and they are copied
for the rows that were asked for alone: a step also runs over slots of others, and the run in which ONNX Runtime
captures a CUDA graph computes the step more than once, which changes no key and no value, but would change states.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.bundle import TensorEntry
from hawk_trt.errors import BackendError
from hawk_trt.runtime.session import Binding, Stage, write
from hawk_trt.stages import BIAS_KEEP, DECODER, FIRST_LAYER, in_place

# Memory-efficient attention of ONNX Runtime asks for multiples of 4 or 8; captured steps are few where sizes are few.
_COLUMN_STEP = 256
# An idle cache serves a generation unless it has so many times the columns, all of which attention would read.
_MOST_EXCESS = 4


class DecodeStep:
    """One token of each of the first rows of a cache.

    All but a portable cache stands still in memory, so a GPU captures the second run as a CUDA graph and replays it.

    Attributes:
        tensors: inputs and outputs of both stages by name, but for the cache.
    """

    def __init__(self, stages: Mapping[str, Stage], count: int) -> None:
        self._stages = {name: stages[name] for name in (FIRST_LAYER, DECODER)}
        self._count = count
        self._place = stages[FIRST_LAYER].device
        first, decoder = (stage.entry for stage in self._stages.values())
        dims = {"batch": count, "num_text": count, "num_visual": 1, "seq_len": 1, "num_kept_total": 1}
        self.tensors = {
            spec.name: self._place.zeros(
                tuple(dims[size] if isinstance(size, str) else size for size in spec.shape), spec.dtype
            )
            for spec in (*first.inputs, *first.outputs, *decoder.outputs)
            if "." not in spec.name
        }
        write(self.tensors["source_rows"], -1 - np.arange(count, dtype=np.int64)[:, None])
        write(self.tensors["select_bias"], np.full((count, 1), BIAS_KEEP, np.float32))
        self._bindings: dict[str, Binding] = {}
        self._captured = False

    def run(self, cache: "KVCache", inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Run both stages.

        Args:
            cache: the same every time.
            inputs: what is new in this step, by name; not every target takes all.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        for name in inputs.keys() & self.tensors.keys():
            write(self.tensors[name], inputs[name])
        warm = len(self._bindings) == len(self._stages)
        if warm and self._place.capture and all(stage.can_capture for stage in self._stages.values()):
            try:
                for binding in self._bindings.values():
                    binding.replay()
            except BackendError as error:
                if self._captured:
                    raise
                self._place.capture = False
                warnings.warn(f"decode runs without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)
            else:
                self._place.num_captured += not self._captured
                self._captured = True
                return
        for name, stage in self._stages.items():
            if not warm:
                inputs_of = self.tensors | cache.inputs(name, 0, self._count)
                outputs_of = self.tensors | cache.outputs(name, 0, self._count)
                self._bindings[name] = Binding(stage, inputs_of, outputs_of)
            elif not cache.in_place:
                self._bindings[name].rebind(cache.inputs(name, 0, self._count), cache.names(name))
            self._bindings[name].run()
            if not cache.in_place:
                cache.keep(name, self._bindings[name].results())

    def forget_graphs(self) -> None:
        """Give the memory of captured graphs back."""
        for binding in self._bindings.values():
            binding.forget_graph()


class KVCache:
    """Keys and values of all layers in some slots, and the states of linear layers.

    Attributes:
        slots: rows that it holds.
        columns: that a row can hold.
        starts: int64 [slots], the first column of each row that holds a token.
        ends: int64 [slots], where each row writes next; the same for all when portable.
        free: slots that no generation has.
        steps: decode steps bound to this cache, by their rows.
    """

    def __init__(self, stages: Mapping[str, Stage], slots: int, columns: int, *, shared: bool) -> None:
        """Make a cache without tensors: `fill` makes them, or `carry` one by one."""
        self.slots, self.columns = slots, columns
        self.starts, self.ends = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.free = set(range(slots))
        self.steps: dict[int, DecodeStep] = {}
        self._stages, self._shared = stages, shared
        self.in_place = in_place(stages[FIRST_LAYER].entry.target)
        # a step also writes to slots that it is not asked for; in a shared cache that is behind all that counts
        self._width = columns + shared if self.in_place else 0
        self._names: dict[str, list[tuple[str, str]]] = {}  # by stage, the input and output of each tensor
        self._specs: dict[str, TensorEntry] = {}  # by the name of the output
        for stage in (FIRST_LAYER, DECODER):
            entry = stages[stage].entry
            pasts = [spec.name for spec in entry.inputs if "." in spec.name]
            presents = [spec for spec in entry.outputs if "." in spec.name]
            self._names[stage] = [(past, spec.name) for past, spec in zip(pasts, presents, strict=True)]
            self._specs |= {spec.name: spec for spec in presents}
        self._tensors: dict[str, ort.OrtValue] = {}  # by the name of the output
        self._made: dict[str, ort.OrtValue] = {}  # of a shared cache: states as the last run wrote them
        self._used: set[int] = set()  # slots that hold what a generation left

    def fill(self) -> None:
        """Make its tensors, of zeros."""
        for present in self._specs:
            self._make(present)

    def _make(self, present: str) -> None:
        self._tensors[present] = self._zeros(present, self.slots)
        if self._shared and self._is_state(present):
            self._made[present] = self._zeros(present, self.slots)

    @property
    def is_idle(self) -> bool:
        """Whether no generation has any of its slots."""
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
        for present in self._specs if taken & self._used else ():
            zeros = self._zeros(present, 1)
            for slot in taken & self._used:
                write(self._rows(self._tensors, present, slot, 1), zeros)
        self._used |= taken

    def give_back(self, slots: Iterable[int]) -> None:
        """Free slots; a step that runs over them meanwhile writes to their first column."""
        for slot in slots:
            self.starts[slot] = self.ends[slot] = 0
            self.free.add(slot)

    def inputs(self, stage: str, first: int, count: int) -> dict[str, ort.OrtValue]:
        """Some neighbouring slots as inputs of a stage."""
        return {past: self._rows(self._tensors, present, first, count) for past, present in self._names[stage]}

    def outputs(self, stage: str, first: int, count: int) -> dict[str, ort.OrtValue]:
        """The same memory as outputs of a stage in place; nothing, which is new memory, when portable."""
        if not self.in_place:
            return {}
        written = self._tensors | self._made
        return {present: self._rows(written, present, first, count) for _, present in self._names[stage]}

    def settle(self, slots: Iterable[int]) -> None:
        """After both stages: their states of these slots are what the next run reads; others keep their own."""
        if not self._made:
            return
        taken = set(slots)
        others = set(range(self.slots)) - self.free - taken
        for present, made in self._made.items():
            if not others:
                write(self._tensors[present], made)
                continue
            for slot in taken:
                row = self._rows(self._made, present, slot, 1)
                write(self._rows(self._tensors, present, slot, 1), row)

    def names(self, stage: str) -> list[str]:
        """Outputs of a stage that are caches."""
        return [present for _, present in self._names[stage]]

    def keep(self, stage: str, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Keep the caches that a portable stage returned."""
        if not self.in_place:
            self._tensors |= {present: outputs[present] for present in self.names(stage)}

    def tensors(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """A layer's keys and values, or its two states, of all slots."""
        first, second = (name for name in self._specs if name.endswith(f".{layer}"))
        return self._tensors[first], self._tensors[second]

    def step(self, count: int) -> DecodeStep:
        """The decode step over the first slots."""
        if count not in self.steps:
            self.steps[count] = DecodeStep(self._stages, count)
        return self.steps[count]

    def forget_steps(self) -> None:
        """Let go of all that holds on to its tensors, or replays with their addresses."""
        for step in self.steps.values():
            step.forget_graphs()
        self.steps.clear()

    def check_room(self, slots: list[int]) -> None:
        """Refuse a write beyond the end: TensorRT would drop it silently.

        Raises:
            BackendError: the cache is full.
        """
        needed = int(self.ends[slots].max()) + 1
        if needed > self.columns:
            raise BackendError(
                f"KV cache: got {needed} columns to hold, expected at most {self.columns}; "
                "start the generation with a larger max_new_tokens"
            )

    def carry(self, parts: "list[tuple[KVCache, int]]", slots: list[int], spent: "list[KVCache]") -> None:
        """Copy rows of other caches into slots of this one, tensor by tensor, on the device.

        Args:
            parts: a cache and a row of it, for each slot.
            slots: to copy to.
            spent: caches of which nothing else is in use: they give each tensor up as soon as it was copied.
        """
        lengths = [int(source.ends[row] - source.starts[row]) for source, row in parts]
        # a portable step appends one column to all rows, so they end together
        end = 0 if self.in_place else max(lengths)
        self._width = self._width or end
        for slot, length in zip(slots, lengths, strict=True):
            self.starts[slot], self.ends[slot] = (0, length) if self.in_place else (end - length, end)
        for source in spent:
            source.forget_steps()
        for present in self._specs:
            if present not in self._tensors:
                self._make(present)
            for (source, row), slot, length in zip(parts, slots, lengths, strict=True):
                if self._is_state(present):
                    state = source._rows(source._tensors, present, row, 1)
                    write(self._rows(self._tensors, present, slot, 1), state)
                else:
                    self._copy(present, source, row, slot, length)
            for source in spent:
                del source._tensors[present]
                source._made.pop(present, None)

    def _copy(self, present: str, source: "KVCache", row: int, slot: int, length: int) -> None:
        """The used columns of one row, head by head: they lie side by side."""
        heads, columns, dim = self._row_shape(present)
        own, others = self._tensors[present], source._tensors[present]
        width = others.shape()[2]
        view = self._stages[FIRST_LAYER].view
        for head in range(heads if length else 0):
            at = ((slot * heads + head) * columns + int(self.starts[slot])) * dim
            there = ((row * heads + head) * width + int(source.starts[row])) * dim
            write(view(own, at, (length, dim)), view(others, there, (length, dim)))

    def _rows(self, tensors: Mapping[str, ort.OrtValue], present: str, first: int, count: int) -> ort.OrtValue:
        if count == self.slots:
            return tensors[present]
        shape = self._row_shape(present)
        return self._stages[FIRST_LAYER].view(tensors[present], first * math.prod(shape), (count, *shape))

    def _zeros(self, present: str, count: int) -> ort.OrtValue:
        return self._stages[FIRST_LAYER].device.zeros((count, *self._row_shape(present)), self._specs[present].dtype)

    def _row_shape(self, present: str) -> tuple[int, ...]:
        return tuple(self._width if isinstance(size, str) else size for size in self._specs[present].shape[1:])

    def _is_state(self, present: str) -> bool:
        return not any(isinstance(size, str) for size in self._specs[present].shape[1:])


class CachePool:
    """The caches of a backend.

    Attributes:
        shared: whether generations share caches.
    """

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
                cache.take(slots)
                return cache, list(slots)
        cache = self._new(count, columns)
        cache.fill()
        cache.take(range(count))
        return cache, list(range(count))

    def gather(self, parts: list[tuple[KVCache, int]], columns: int) -> tuple[KVCache, list[int]]:
        """Rows of several caches in one: the largest of theirs where the others fit in beside its own, else a new one.

        Returns:
            The cache, and the slot of each row.
        """
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
            home.give_back([row])
        return cache, slots

    def give_back(self, cache: KVCache, slots: Mapping[int, int]) -> None:
        """Free the slots of some rows. Of the caches that nobody uses only the largest stays."""
        cache.give_back(slots.values())
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
