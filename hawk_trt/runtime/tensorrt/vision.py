"""The vision stage in TensorRT: feeds in, visual embeddings where first_layer reads them out.

A tensor of visual rows is [num_visual, ..]. A call writes its rows right there where each is a multiple of 256 bytes
long, else to a region of its own, and they are moved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from hawk_trt.engine_folder import PREFILL, EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.engine import ALIGNMENT, resolve
from hawk_trt.runtime.tensorrt.memory import largest_dims, tensor_bytes
from hawk_trt.stages import FIRST_LAYER, VISION

if TYPE_CHECKING:
    from hawk_trt.runtime.tensorrt.backend import TensorRtBackend

_NUM_VISUAL = "num_visual"
# Regions for rows that are moved afterwards.
_PART = "part/"


@dataclass(frozen=True, slots=True)
class _Rows:
    """One tensor of visual rows: the shape of a row, its dtype and its bytes."""

    name: str
    row: tuple[int, ...]
    dtype: str
    row_bytes: int

    @property
    def direct(self) -> bool:
        """Whether any call can write its rows in place."""
        return self.row_bytes % ALIGNMENT == 0


class TensorRtVisual:
    """Visual embeddings [rows, hidden], where first_layer reads them. The next encode overwrites them."""

    def __init__(self, backend: "TensorRtBackend", rows: int) -> None:
        self.rows = rows
        self._backend = backend
        self._number = backend.encoder.count

    @property
    def nbytes(self) -> int:
        """Bytes of its rows in all tensors."""
        return self.rows * sum(tensor.row_bytes for tensor in self._backend.encoder.tensors)

    def check(self, backend: "TensorRtBackend") -> None:
        """Refuse what another backend made, or what was overwritten.

        Raises:
            BackendError: it is.
        """
        if self._backend is not backend or self._number != backend.encoder.count:
            raise BackendError("visual: got embeddings that a later encode has overwritten; encode again")

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy."""
        backend = self._backend
        self.check(backend)
        bundle = backend.manifest.bundle
        with backend.cuda.active():
            return backend.read("visual_embeds", (self.rows, bundle.language.hidden_size), bundle.dtype)


class HostVisual:
    """A copy on the host of what an encode made, by tensor name.

    Attributes:
        place: number of the encode whose rows, still on the GPU, are these.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], place: int) -> None:
        self.arrays = arrays
        self.place = place

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.arrays.values())

    def numpy(self) -> npt.NDArray[Any]:
        """The embeddings."""
        return self.arrays["visual_embeds"]


class Encoder:
    """Runs the vision plan.

    Attributes:
        count: encodes and joins so far; each overwrites the one before.
        tensors: what vision makes and first_layer reads.
    """

    def __init__(self, backend: "TensorRtBackend") -> None:
        self.count = 0
        self._backend = backend
        self.tensors = _tensors(backend.engines)
        self._words = {entry.name: entry.shape for entry in backend.engines.plan(VISION).inputs}

    @staticmethod
    def sizes(engines: EngineFolder) -> dict[str, int]:
        """Bytes of the regions that it needs."""
        rows = largest_dims(engines.manifest)[_NUM_VISUAL]
        return {_PART + tensor.name: rows * tensor.row_bytes for tensor in _tensors(engines) if not tensor.direct}

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> TensorRtVisual:
        """Run one call a feed, into num_rows rows; one zero row where there is none.

        Raises:
            BackendError: more than the plans were built for, or TensorRT or CUDA failed.
        """
        backend = self._backend
        self._check_room(num_rows)
        self.count += 1
        done = 0
        for feed in feeds:
            done += self._run(feed, done, num_rows)
        assert done == num_rows, f"vision made {done} rows of {num_rows}"
        if not num_rows:
            for tensor in self.tensors:
                backend.cuda.zero(backend.memory.addresses[tensor.name], tensor.row_bytes)
        backend.staging.synchronize()
        return TensorRtVisual(backend, max(num_rows, 1))

    def keep(self, visual: TensorRtVisual) -> HostVisual:
        """A copy on the host."""
        visual.check(self._backend)
        arrays = {
            tensor.name: self._backend.read(tensor.name, (visual.rows, *tensor.row), tensor.dtype)
            for tensor in self.tensors
        }
        return HostVisual(arrays, self.count)

    def join(self, parts: Sequence[HostVisual]) -> TensorRtVisual:
        """Rows of copies where first_layer reads them; nothing moves where a single part is there already.

        Raises:
            BackendError: more than the plans were built for.
        """
        rows = sum(len(part.numpy()) for part in parts)
        if len(parts) == 1 and parts[0].place == self.count:
            return TensorRtVisual(self._backend, rows)
        self._check_room(rows)
        self.count += 1
        done = 0
        for part in parts:
            for tensor in self.tensors:
                place = self._backend.memory.addresses[tensor.name] + done * tensor.row_bytes
                self._backend.staging.upload(place, part.arrays[tensor.name])
            done += len(part.numpy())
        if len(parts) == 1:
            parts[0].place = self.count
        self._backend.staging.synchronize()
        return TensorRtVisual(self._backend, rows)

    def _check_room(self, num_rows: int) -> None:
        backend = self._backend
        most = backend.engines.plan(FIRST_LAYER).range(PREFILL, "visual_embeds").max[0]
        if num_rows > most:
            raise BackendError(
                f"visual tokens: got {num_rows}, these engines take {most}. Shrink the images with max_pixels, "
                f"or rebuild with a larger --max-visual-tokens: {backend.manifest.rebuild}"
            )

    def _run(self, feed: dict[str, npt.NDArray[Any]], done: int, num_rows: int) -> int:
        """One call, into the rows behind those that are done; returns how many it makes."""
        backend = self._backend
        places, context = backend.memory.addresses, backend.contexts[VISION, PREFILL]
        targets = {
            tensor.name: places[tensor.name] + done * tensor.row_bytes if tensor.direct else places[_PART + tensor.name]
            for tensor in self.tensors
        }
        dims = {
            word: size
            for name, array in feed.items()
            for word, size in zip(self._words[name], array.shape, strict=True)
            if isinstance(word, str)
        }
        rows = context.bind(dims, {**places, **targets})["visual_embeds"][0]
        assert done + rows <= num_rows, f"vision makes {rows} rows behind {done} of {num_rows}"
        for name, array in feed.items():
            backend.staging.upload(places[name], array)
        context.enqueue()
        for tensor in self.tensors:
            if not tensor.direct:
                place = places[tensor.name] + done * tensor.row_bytes
                backend.cuda.copy(place, targets[tensor.name], rows * tensor.row_bytes)
        return rows


def _tensors(engines: EngineFolder) -> list[_Rows]:
    """What vision makes and first_layer reads."""
    tensors = []
    for entry in engines.plan(FIRST_LAYER).inputs:
        if _NUM_VISUAL in entry.shape:
            row = resolve(entry, {_NUM_VISUAL: 1})[1:]
            tensors.append(_Rows(entry.name, row, entry.dtype, tensor_bytes(row, entry.dtype)))
    return tensors
