"""What lies where on the GPU: one allocation, made once, large enough for the largest request.

Regions bear the names of the stage contract, so that what one stage writes is what the next reads, at one
address. A region is as large as the optimization profiles allow, and starts at a multiple of 256 bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import TensorEntry, numpy_dtype
from hawk_trt.engine_folder import ALIGNMENT, EngineManifest, PlanEntry
from hawk_trt.runtime.tensorrt.cuda import CudaDevice
from hawk_trt.runtime.tensorrt.engine import resolve


class Memory:
    """Named regions of one device allocation; entries: dtype and shape of the stages' tensors, by name."""

    def __init__(self, cuda: CudaDevice, manifest: EngineManifest, others: Mapping[str, int]) -> None:
        """Lay out and allocate: all tensors of the stages but the KV cache, and other regions by their bytes."""
        self.cuda = cuda
        self.entries = tensor_entries(manifest)
        sizes = {name: aligned(size) for name, size in {**others, **_largest_bytes(manifest)}.items()}
        self.size_bytes = sum(sizes.values())
        start = cuda.allocate(self.size_bytes)
        assert start % ALIGNMENT == 0
        self.addresses: dict[str, int] = {}
        for name, size in sizes.items():
            self.addresses[name] = start
            start += size

    def upload(self, name: str, array: npt.NDArray[Any]) -> None:
        """Enqueue a copy of an array to a region; the array may change as soon as this returns."""
        self.cuda.upload(self.addresses[name], array)

    def read(self, name: str, dims: Mapping[str, int]) -> npt.NDArray[Any]:
        """A host copy of a tensor of these dimensions, after all enqueued work."""
        entry = self.entries[name]
        return self.cuda.download(self.addresses[name], resolve(entry, dims), numpy_dtype(entry.dtype))


def aligned(size_bytes: int) -> int:
    """The next multiple of 256; at least 256, so that no two regions share an address."""
    return max(-(-size_bytes // ALIGNMENT), 1) * ALIGNMENT


def tensor_bytes(entry: TensorEntry, dims: Mapping[str, int]) -> int:
    """Size of a tensor of these dimensions."""
    return int(np.prod(resolve(entry, dims), dtype=np.int64)) * numpy_dtype(entry.dtype).itemsize


def tensor_entries(manifest: EngineManifest) -> dict[str, TensorEntry]:
    """Every tensor of the three stages, by name."""
    return {entry.name: entry for plan in manifest.plans for entry in (*plan.inputs, *plan.outputs)}


def _largest_bytes(manifest: EngineManifest) -> dict[str, int]:
    """The largest size of every tensor but the KV cache's, over all optimization profiles of its plans."""
    largest: dict[str, int] = {}
    profiles: list[tuple[PlanEntry, dict[str, int]]] = []
    for plan in manifest.plans:
        inputs = {entry.name: entry for entry in plan.inputs}
        for profile in plan.profiles:
            words = (zip(inputs[limits.name].shape, limits.max, strict=True) for limits in profile)
            dims = {word: size for pair in words for word, size in pair if isinstance(word, str)}
            profiles.append((plan, dims))
            for word, size in dims.items():
                largest[word] = max(largest.get(word, 0), size)
    sizes: dict[str, int] = {}
    for plan, dims in profiles:
        for entry in (*plan.inputs, *plan.outputs):
            if not entry.name.startswith(("past_", "present_")):  # what a profile does not bound, another does
                sizes[entry.name] = max(sizes.get(entry.name, 0), tensor_bytes(entry, {**largest, **dims}))
    return sizes
