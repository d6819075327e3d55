"""What the vision stage made of images and videos asked about before, by the content of their pixel values.

In: the images and videos of a batch, one Patches each. Out: their visual embeddings; the vision stage runs over the
unknown ones alone. HAWK's choice depends on the question and is made anew each time, what the vision tower makes of
an image does not. A long video, whose frames are made while they are read, would have to be read twice to be known:
it is not kept.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import PromptLayout
from hawk_trt.models.family import Family, Patches
from hawk_trt.request import ModelInputs
from hawk_trt.runtime.protocol import Backend, Visual

if TYPE_CHECKING:
    from hawk_trt.models.streamed_rows import StreamedRows

_MB = 1_000_000
_PART_BYTES = 1 << 20
DEFAULT_VISION_CACHE_MB = 256


class VisionCache:
    """Visual embeddings in the order of their last use, size_bytes of them, up to max_bytes."""

    def __init__(self, backend: Backend, family: Family, max_mb: float) -> None:
        if isinstance(max_mb, bool) or not isinstance(max_mb, (int, float)) or not 0 <= max_mb < float("inf"):
            raise InvalidInput(f"vision_cache_mb: got {max_mb!r}, expected megabytes of at least 0, which is off")
        self.max_bytes = int(max_mb * _MB)
        self.size_bytes = 0
        self._backend, self._family = backend, family
        self._entries: OrderedDict[bytes, Visual] = OrderedDict()

    def encode(self, prompts: Sequence[tuple[ModelInputs, PromptLayout]]) -> tuple[Visual, list[int]]:
        """Visual embeddings of all prompts: those of each one's images, then its videos.

        Returns also of each prompt how many images and videos the vision stage did not run for. Raises InvalidInput:
        pixel values that do not fit their grid.
        """
        patches = list(_patches(prompts))
        streamed = not all(isinstance(own.pixel_values, np.ndarray) for _, own in patches)  # to hash is to read twice
        if not patches or streamed or not self.max_bytes:
            feeds = (feed for _, own in patches for feed in self._feeds(own))
            return self._backend.encode(feeds, sum(layout.num_rows for _, layout in prompts)), [0] * len(prompts)
        cached = [0] * len(prompts)
        parts: list[Visual] = []
        here: dict[bytes, Visual] = {}
        for number, own in patches:
            for item in one_by_one(own):
                key = content_key(item)
                part = here.get(key, self._entries.get(key))
                cached[number] += part is not None
                if part is None:
                    rows = int(self._family.vision.tokens_per_item(item.grid_thw).sum())
                    part = self._backend.keep(self._backend.encode(self._feeds(item), rows))
                parts.append(part)
                here[key] = part
        for key, part in here.items():
            self._put(key, part)
        return self._backend.join(parts), cached

    def _feeds(self, patches: Patches) -> Iterator[dict[str, npt.NDArray[Any]]]:
        return self._family.vision_feeds(patches, self._backend.max_vision_patches)

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


def content_key(item: Patches) -> bytes:
    """sha256 of an image's or video's grid and pixel values; of parts of them at first, which all cores share."""
    pixels = np.ascontiguousarray(item.pixel_values)
    octets = pixels.reshape(-1).view(np.uint8)
    parts = (octets[first : first + _PART_BYTES] for first in range(0, len(octets), _PART_BYTES))
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(lambda part: hashlib.sha256(part).digest(), parts))
    about = f"{item.grid_thw.tolist()} {pixels.dtype} {pixels.shape}".encode()
    return hashlib.sha256(b"".join([about, *digests])).digest()


def _patches(prompts: Sequence[tuple[ModelInputs, PromptLayout]]) -> Iterator[tuple[int, Patches]]:
    """The images and the videos of each prompt, with its number."""
    for number, (inputs, layout) in enumerate(prompts):
        for name, pixels, grid in (
            ("pixel_values", inputs.pixel_values, layout.image_grid_thw),
            ("pixel_values_videos", inputs.pixel_values_videos, layout.video_grid_thw),
        ):
            if (pixels is None) != (not len(grid)):
                raise InvalidInput(f"{name}: got it without its grid_thw, or the grid without it; expected both")
            if pixels is not None:
                # rows of a long video are made while the vision stage reads them
                whole = not hasattr(pixels, "parts")
                yield number, Patches(np.asarray(pixels, np.float32) if whole else cast("StreamedRows", pixels), grid)


def one_by_one(patches: Patches) -> Iterator[Patches]:
    """Each image or video on its own, its pixel values a view."""
    shares = patches.grid_thw.prod(axis=1)
    total, rows = int(shares.sum()), len(patches.pixel_values)
    ends = np.cumsum(shares) * rows
    if not total or (ends % total).any():
        yield patches  # not of this grid: the family says what is wrong
        return
    start = 0
    for number, end in enumerate((ends // total).tolist()):
        yield Patches(patches.pixel_values[start:end], patches.grid_thw[number : number + 1])
        start = end
