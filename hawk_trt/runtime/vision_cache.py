"""What the vision stage made of images and videos asked about before, by the content of their pixel values.

In: the images and videos of a batch, one Patches each. Out: their visual embeddings; the vision stage runs over the
unknown ones alone. HAWK's choice depends on the question and is made anew each time, what the vision tower makes of
an image does not. A long video, whose frames are made while they are read, would have to be read twice to be known:
it is not kept.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.family import Patches
from hawk_trt.runtime.protocol import Backend, Visual

_MB = 1_000_000
DEFAULT_VISION_CACHE_MB = 256


class VisionCache:
    """Visual embeddings in the order of their last use, up to a number of bytes.

    Attributes:
        max_bytes: of all entries together.
        size_bytes: of the entries that it holds.
    """

    def __init__(self, backend: Backend, max_mb: float) -> None:
        if isinstance(max_mb, bool) or not isinstance(max_mb, (int, float)) or not 0 <= max_mb < float("inf"):
            raise InvalidInput(f"vision_cache_mb: got {max_mb!r}, expected megabytes of at least 0, which is off")
        self.max_bytes = int(max_mb * _MB)
        self.size_bytes = 0
        self._backend = backend
        self._entries: OrderedDict[bytes, Visual] = OrderedDict()

    def encode(self, items: Sequence[Patches], run: Callable[[Patches], Visual]) -> tuple[Visual, list[bool]]:
        """Visual embeddings of all items, one below the other.

        Args:
            items: images and videos, at least one.
            run: the vision stage over one of them.

        Returns:
            The embeddings, and of each item whether the vision stage did not run for it.
        """
        parts = []
        known = []
        here: dict[bytes, Visual] = {}
        for item in items:
            key = content_key(item)
            part = None if key is None else here.get(key, self._entries.get(key))
            known.append(part is not None)
            parts.append(self._backend.keep(run(item)) if part is None else part)
            if key is not None:
                here[key] = parts[-1]
        for key, part in here.items():
            self._put(key, part)
        return self._backend.join(parts), known

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.size_bytes = 0

    def _put(self, key: bytes, part: Visual) -> None:
        """Make an entry the last used one; what no longer fits goes, the longest unused first."""
        if part.nbytes > self.max_bytes:
            return
        if key not in self._entries:
            self._entries[key] = part
            self.size_bytes += part.nbytes
        self._entries.move_to_end(key)
        while self.size_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.nbytes


def content_key(item: Patches) -> bytes | None:
    """sha256 of an image's or video's grid and pixel values; None where they are made while they are read."""
    if isinstance(item.pixel_values, StreamedRows):
        return None
    pixels = np.ascontiguousarray(item.pixel_values)
    digest = hashlib.sha256(f"{item.grid_thw.tolist()} {pixels.dtype} {pixels.shape}".encode())
    digest.update(pixels.reshape(-1).view(np.uint8).data)
    return digest.digest()


def one_by_one(patches: Patches) -> Iterator[Patches]:
    """Each image or video on its own, its pixel values a view."""
    shares = patches.grid_thw.prod(axis=1)
    total, rows = int(shares.sum()), len(patches.pixel_values)
    ends = np.cumsum(shares) * rows
    if not total or (ends % total).any() or isinstance(patches.pixel_values, StreamedRows):
        yield patches  # streamed, or not of this grid: then the family says what is wrong
        return
    start = 0
    for number, end in enumerate((ends // total).tolist()):
        yield Patches(patches.pixel_values[start:end], patches.grid_thw[number : number + 1])
        start = end
