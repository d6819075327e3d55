"""The vision stage in TensorRT: feeds in, visual embeddings where first_layer reads them out.

A tensor of visual rows is [num_visual, ..], and each call writes its rows behind those of the one before.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import BackendError
from hawk_trt.runtime.protocol import Visual
from hawk_trt.runtime.tensorrt.engine import Context
from hawk_trt.runtime.tensorrt.memory import Memory, tensor_bytes
from hawk_trt.stages import FIRST_LAYER, VISION

_NUM_VISUAL = "num_visual"


class TensorRtVisual:
    """A Visual of an encode or join by its count: rows [rows, hidden]; arrays: all tensors, once they were kept."""

    def __init__(self, encoder: "Encoder", rows: int) -> None:
        self.encoder, self.rows, self.count = encoder, rows, encoder.count
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    @property
    def nbytes(self) -> int:
        return self.rows * sum(self.encoder.row_bytes.values())

    def numpy(self) -> npt.NDArray[Any]:
        return self.encoder.keep(self).arrays["visual_embeds"]


class Encoder:
    """Runs the vision plan over tiles or frames of one size; count: encodes and joins, each overwrites the last one."""

    def __init__(self, memory: Memory, contexts: Sequence[Context], engines: EngineFolder) -> None:
        """Keep what it needs; contexts: one for each optimization profile."""
        self.count = 0
        visual = [entry for entry in engines.plan(FIRST_LAYER).inputs if _NUM_VISUAL in entry.shape]
        self.row_bytes = {entry.name: tensor_bytes(entry, {_NUM_VISUAL: 1}) for entry in visual}
        self._memory, self._contexts, self._rebuild = memory, contexts, engines.manifest.rebuild
        self._words = {entry.name: entry.shape for entry in engines.plan(VISION).inputs}
        limits = engines.manifest.limits
        self._most = limits.visual_tokens * limits.batch  # rows of all prompts together

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> TensorRtVisual:
        """Run a call a feed, into num_rows rows, for 0 one of zeros; BackendError: too many rows, or a run failed."""
        self._overwrite(num_rows)
        done, cuda = 0, self._memory.cuda
        with cuda.active():
            for feed in feeds:
                for context, part in self._calls(feed):
                    done += self._run(context, part, done, num_rows)
            assert done == num_rows, f"vision made {done} rows of {num_rows}"
            if not num_rows:
                for name, size in self.row_bytes.items():
                    cuda.zero(self._memory.addresses[name], size)
            cuda.synchronize()
        return TensorRtVisual(self, max(num_rows, 1))

    def rows(self, visual: Visual) -> int:
        """How many rows first_layer reads of an encode or join; BackendError where it is none, or was overwritten."""
        own = self._own(visual)
        if own.count != self.count:
            raise BackendError("visual: got embeddings that a later encode has overwritten; encode again")
        return own.rows

    def keep(self, visual: Visual) -> TensorRtVisual:
        """The same with a copy on the host, since every encode overwrites the one before."""
        own = self._own(visual)
        if not own.arrays:
            dims = {_NUM_VISUAL: self.rows(own)}
            with self._memory.cuda.active():
                own.arrays = {name: self._memory.read(name, dims) for name in self.row_bytes}
        return own

    def join(self, parts: Sequence[Visual]) -> TensorRtVisual:
        """Rows of copies where first_layer reads them, but for a part there already; BackendError for too many."""
        copies = [self._own(part) for part in parts]
        joined = copies[0]
        if len(copies) == 1 and joined.count == self.count:
            return joined
        if not all(part.arrays for part in copies):
            raise BackendError("visual: got something else to join than what this backend's keep made")
        rows = sum(part.rows for part in copies)
        self._overwrite(rows)
        done, cuda = 0, self._memory.cuda
        with cuda.active():
            for part in copies:
                for name, size in self.row_bytes.items():
                    cuda.upload(self._memory.addresses[name] + done * size, part.arrays[name])
                done += part.rows
            cuda.synchronize()
        if len(copies) > 1:
            return TensorRtVisual(self, rows)
        joined.count = self.count  # it lies there again
        return joined

    def _own(self, visual: Visual) -> TensorRtVisual:
        if not isinstance(visual, TensorRtVisual) or visual.encoder is not self:
            raise BackendError(f"visual: got {type(visual).__name__}, expected what this backend's encode made")
        return visual

    def _overwrite(self, num_rows: int) -> None:
        if num_rows > self._most:
            raise BackendError(
                f"visual tokens: got {num_rows}, these engines take {self._most}. Shrink the images with max_pixels, "
                f"or rebuild with a larger --max-visual-tokens: {self._rebuild}"
            )
        self.count += 1

    def _calls(self, feed: dict[str, npt.NDArray[Any]]) -> Iterator[tuple[Context, dict[str, npt.NDArray[Any]]]]:
        """A feed in parts of as many frames or tiles as an optimization profile takes at once."""
        word, total = self._words["pixel_values"][0], len(feed["pixel_values"])
        shapes = {name: array.shape for name, array in feed.items()}
        choices = [(min(context.most(shapes, str(word)), total), context) for context in self._contexts]
        most, context = max(choices, key=lambda choice: choice[0])  # of equal ones the first, which is for one frame
        most = most or total  # where none takes it, bind says why
        for start in range(0, total, most):
            part = slice(start, start + most)
            yield context, {n: array[part] if self._words[n][0] == word else array for n, array in feed.items()}

    def _run(self, context: Context, feed: dict[str, npt.NDArray[Any]], done: int, num_rows: int) -> int:
        """One call, into the rows behind those that are done; returns how many it makes."""
        addresses = self._memory.addresses
        places = {name: addresses[name] + done * size for name, size in self.row_bytes.items()}
        dims = {
            word: size
            for name, array in feed.items()
            for word, size in zip(self._words[name], array.shape, strict=True)
            if isinstance(word, str)
        }
        rows = context.bind(dims, {**addresses, **places})["visual_embeds"][0]
        assert done + rows <= num_rows, f"vision makes {rows} rows behind {done} of {num_rows}"
        for name, array in feed.items():
            self._memory.upload(name, array)
        context.enqueue()
        return rows
