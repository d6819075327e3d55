"""What lies where on the GPU: one allocation, made once, large enough for the largest request.

Regions bear the names of the stage contract, so that what one stage writes is what the next reads, at one
address. A region is as large as the optimization profiles allow, and starts at a multiple of 256 bytes.
"""

from collections.abc import Mapping

import numpy as np

from hawk_trt.bundle import TensorEntry, numpy_dtype
from hawk_trt.engine_folder import EngineManifest
from hawk_trt.runtime.tensorrt.cuda import CudaDevice
from hawk_trt.runtime.tensorrt.engine import ALIGNMENT, resolve


class Memory:
    """Named regions of one device allocation.

    Attributes:
        addresses: device address of each region.
        size_bytes: of the whole.
    """

    def __init__(self, device: CudaDevice, sizes: Mapping[str, int]) -> None:
        self.size_bytes = sum(aligned(size) for size in sizes.values())
        start = device.allocate(self.size_bytes)
        assert start % ALIGNMENT == 0
        self.addresses: dict[str, int] = {}
        for name, size in sizes.items():
            self.addresses[name] = start
            start += aligned(size)


def aligned(size_bytes: int) -> int:
    """The next multiple of 256; at least 256, so that no two regions share an address."""
    return max(-(-size_bytes // ALIGNMENT), 1) * ALIGNMENT


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize


def largest_dims(manifest: EngineManifest) -> dict[str, int]:
    """The largest size of every dynamic dimension, by its word, over all plans and profiles."""
    largest = {"total_len": manifest.limits.context}
    for plan in manifest.plans:
        inputs = {entry.name: entry for entry in plan.inputs}
        for profile in plan.profiles:
            for limits in profile:
                for word, size in zip(inputs[limits.name].shape, limits.max, strict=True):
                    if isinstance(word, str):
                        largest[word] = max(largest.get(word, 0), size)
    return largest


def tensor_sizes(manifest: EngineManifest) -> dict[str, int]:
    """Bytes of every tensor of the three stages but the KV cache, at its largest."""
    largest = largest_dims(manifest)
    entries: dict[str, TensorEntry] = {}
    for plan in manifest.plans:
        entries |= {entry.name: entry for entry in (*plan.inputs, *plan.outputs)}
    return {
        name: tensor_bytes(resolve(entry, largest), entry.dtype)
        for name, entry in entries.items()
        if not name.startswith(("past_", "present_"))
    }
