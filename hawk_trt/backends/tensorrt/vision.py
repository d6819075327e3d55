"""The vision stage in TensorRT: feeds in, visual embeddings where first_layer reads them out.

A tensor of visual rows is [.., num_visual, hidden] with all rows of a level together. A call writes its rows
right there where that is one piece at a multiple of 256 bytes, else to a region of its own, and they are moved.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from hawk_trt.backends.tensorrt.engine import ALIGNMENT, resolve
from hawk_trt.backends.tensorrt.memory import largest_dims, tensor_bytes
from hawk_trt.engine_manifest import PREFILL, EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.stages import FIRST_LAYER, VISION

if TYPE_CHECKING:
    from hawk_trt.backends.tensorrt.backend import TensorRtBackend

_NUM_VISUAL = "num_visual"
# Regions for rows that are moved afterwards.
_PART = "part/"


@dataclass(frozen=True, slots=True)
class _Rows:
    """One tensor of visual rows: bytes of a row, and how many levels of rows it has."""

    name: str
    row_bytes: int
    levels: int

    @property
    def direct(self) -> bool:
        """Whether any call can write its rows in place."""
        return self.levels == 1 and self.row_bytes % ALIGNMENT == 0


class TensorRtVisual:
    """Visual embeddings [rows, hidden], where first_layer reads them. The next encode overwrites them."""

    def __init__(self, backend: "TensorRtBackend", rows: int) -> None:
        self.rows = rows
        self._backend = backend
        self._number = backend.encoder.count

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


class Encoder:
    """Runs the vision plan.

    Attributes:
        count: encodes so far; each overwrites the one before.
    """

    def __init__(self, backend: "TensorRtBackend") -> None:
        self.count = 0
        self._backend = backend
        self._tensors = _tensors(backend.engines)
        self._words = {entry.name: entry.shape for entry in backend.engines.plan(VISION).inputs}

    @staticmethod
    def sizes(engines: EngineFolder) -> dict[str, int]:
        """Bytes of the regions that it needs."""
        rows = largest_dims(engines.manifest)[_NUM_VISUAL]
        return {
            _PART + tensor.name: rows * tensor.levels * tensor.row_bytes
            for tensor in _tensors(engines)
            if not tensor.direct
        }

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> TensorRtVisual:
        """Run one call a feed, into num_rows rows; one zero row where there is none.

        Raises:
            BackendError: more than the plans were built for, or TensorRT or CUDA failed.
        """
        backend = self._backend
        most = backend.engines.plan(FIRST_LAYER).range(PREFILL, "visual_embeds").max[0]
        if num_rows > most:
            raise BackendError(
                f"visual tokens: got {num_rows}, these engines take {most}. Shrink the images with max_pixels, "
                f"or rebuild with a larger --max-visual-tokens: {backend.manifest.rebuild}"
            )
        self.count += 1
        done = 0
        for feed in feeds:
            done += self._run(feed, done, num_rows)
        assert done == num_rows, f"vision made {done} rows of {num_rows}"
        if not num_rows:
            for tensor in self._tensors:
                backend.cuda.zero(backend.memory.addresses[tensor.name], tensor.levels * tensor.row_bytes)
        backend.staging.synchronize()
        return TensorRtVisual(backend, max(num_rows, 1))

    def _run(self, feed: dict[str, npt.NDArray[Any]], done: int, num_rows: int) -> int:
        """One call, into the rows behind those that are done; returns how many it makes."""
        backend = self._backend
        places, context = backend.memory.addresses, backend.contexts[VISION, PREFILL]
        targets = {
            tensor.name: places[tensor.name] + done * tensor.row_bytes if tensor.direct else places[_PART + tensor.name]
            for tensor in self._tensors
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
        for tensor in self._tensors:
            for level in range(0 if tensor.direct else tensor.levels):
                backend.cuda.copy(
                    places[tensor.name] + (level * num_rows + done) * tensor.row_bytes,
                    targets[tensor.name] + level * rows * tensor.row_bytes,
                    rows * tensor.row_bytes,
                )
        return rows


def _tensors(engines: EngineFolder) -> list[_Rows]:
    """What vision makes and first_layer reads."""
    tensors = []
    for entry in engines.plan(FIRST_LAYER).inputs:
        if _NUM_VISUAL in entry.shape:
            *levels, _, hidden = resolve(entry, {_NUM_VISUAL: 1})
            tensors.append(_Rows(entry.name, tensor_bytes((hidden,), entry.dtype), math.prod(levels)))
    return tensors
