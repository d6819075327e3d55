"""The KV cache in ONNX Runtime, in place or concatenated, as the graphs' target asks.

in place   one zeroed tensor [batch, kv_heads, columns, head_dim] a layer, key and value; each is input and
output of its stage at one address, and write_index says where a step writes
portable   every step returns a longer cache, which is the next step's input
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from hawk_trt.bundle import Manifest, numpy_dtype
from hawk_trt.errors import BackendError
from hawk_trt.runtime.session import Binding, Buffer, Device
from hawk_trt.stages import DECODER, FIRST_LAYER, in_place, key_name, value_name


class KVCache:
    """Keys and values of all layers, of one generation.

    Attributes:
        batch: rows.
        columns: that a row can hold.
        starts: int64 [batch], the first column of each row that holds a token.
        ends: int64 [batch], where each row writes next; the same for all when portable.
    """

    def __init__(self, manifest: Manifest, place: Device, target: str, batch: int, columns: int) -> None:
        language = manifest.language
        self.batch = batch
        self.columns = columns
        self.starts = np.zeros(batch, np.int64)
        self.ends = np.zeros(batch, np.int64)
        self._inplace = in_place(target)
        self._layers = {FIRST_LAYER: range(1), DECODER: range(1, language.num_hidden_layers)}
        shape = (batch, language.num_key_value_heads, columns if self._inplace else 0, language.head_dim)
        self._tensors = {
            pair: place.zeros(shape, manifest.dtype) for stage in self._layers for pair in self._names(stage)
        }
        self._write_index = Buffer(place, (batch,), "int64") if self._inplace else None

    @classmethod
    def gather(
        cls, manifest: Manifest, place: Device, target: str, parts: "Sequence[tuple[KVCache, int]]", columns: int
    ) -> "KVCache":
        """Rows of several caches as one, tensor by tensor: what was gathered is gone where it was.

        Args:
            manifest: of the bundle.
            place: where all of them lie.
            target: of the graphs.
            parts: a cache and the number of one of its rows, for each row of the new one.
            columns: that the new one can hold a row.
        """
        dtype = manifest.dtype
        cache = cls(manifest, place, target, len(parts), 0)
        cache.columns = columns
        lengths = np.array([source.ends[row] - source.starts[row] for source, row in parts])
        if cache._inplace:
            cache.ends[:] = lengths
        else:  # a step appends one column to all rows, so they end together
            columns = int(lengths.max())
            cache.starts[:], cache.ends[:] = columns - lengths, columns
        sources = {id(source): source for source, _ in parts}
        for pair, empty in cache._tensors.items():
            batch, kv_heads, _, head_dim = empty.shape()
            tensors = {key: source._tensors.pop(pair) for key, source in sources.items()}
            taken = {key: place.peek(tensor, dtype) for key, tensor in tensors.items()}
            rows = np.zeros((batch, kv_heads, columns, head_dim), numpy_dtype(dtype))
            for number, (source, row) in enumerate(parts):
                used = taken[id(source)][row, :, source.starts[row] : source.ends[row]]
                rows[number, :, cache.starts[number] : cache.ends[number]] = used
            cache._tensors[pair] = place.upload(rows)
        cache._set_write_index()
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.tensor_size_in_bytes() for tensor in self._tensors.values())

    @property
    def length(self) -> int:
        """Columns written so far, in the longest row."""
        return int(self.ends.max())

    def tensors(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """A layer's keys and values."""
        key, value = (self._tensors[name(layer, past=True), name(layer, past=False)] for name in (key_name, value_name))
        return key, value

    def inputs(self, stage: str) -> dict[str, ort.OrtValue]:
        """The cache as inputs of a stage, with where to write where it is written in place."""
        caches = {past: self._tensors[past, present] for past, present in self._names(stage)}
        return caches if self._write_index is None else {"write_index": self._write_index.value, **caches}

    def outputs(self, stage: str) -> dict[str, ort.OrtValue]:
        """The cache as outputs of a stage: the same tensors in place, nothing (new memory) when portable."""
        if not self._inplace:
            return {}
        return {present: self._tensors[past, present] for past, present in self._names(stage)}

    def rebind(self, stage: str, binding: Binding) -> None:
        """Point a step's binding at the cache as it is now; in place it never moves."""
        if not self._inplace:
            for past, present in self._names(stage):
                binding.input(past, self._tensors[past, present])
                binding.output(present, None)

    def take(self, stage: str, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Keep the caches that a portable stage returned."""
        if not self._inplace:
            for past, present in self._names(stage):
                self._tensors[past, present] = outputs[present]

    def take_step(self, stage: str, binding: Binding) -> None:
        """Keep the caches of a step."""
        if not self._inplace:
            self.take(stage, binding.results())

    def advance(self, columns: int) -> None:
        """Count columns as written."""
        self.ends += columns
        self._set_write_index()

    def check_room(self, columns: int) -> None:
        """Refuse a write beyond the end: TensorRT would drop it silently.

        Raises:
            BackendError: the cache is full.
        """
        if self.length + columns > self.columns:
            raise BackendError(
                f"KV cache: got {self.length + columns} columns to hold, expected at most {self.columns}; "
                "start the generation with a larger max_new_tokens"
            )

    def _set_write_index(self) -> None:
        if self._write_index is not None:
            self._write_index.set(self.ends)

    def _names(self, stage: str) -> Iterator[tuple[str, str]]:
        for layer in self._layers[stage]:
            for name in (key_name, value_name):
                yield name(layer, past=True), name(layer, past=False)
