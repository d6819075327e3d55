"""Uploads and downloads through one pinned buffer.

Pinned memory is what a copy engine reads without the CPU, and what a captured copy may name. One buffer of fixed
size serves arrays of any size: what does not fit is sent in parts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.runtime.tensorrt.cuda import CudaDevice

STAGING_BYTES = 16 << 20
_ALIGNMENT = 256


class Staging:
    """The pinned buffer, filled from its start after every synchronisation."""

    def __init__(self, device: CudaDevice, size_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._pinned = device.allocate_pinned(size_bytes)
        self._used = 0

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueue a copy of an array to the device; the array may change as soon as this returns."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        done = 0
        while done < len(content):
            start = self._room()
            part = content[done : done + len(self._pinned.bytes) - start]
            self._pinned.bytes[start : start + len(part)] = part
            self._device.copy_in(address + done, self._pinned.address + start, len(part))
            self._used = start + len(part)
            done += len(part)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A host copy of a tensor, after all enqueued work."""
        array = np.empty(shape, dtype)
        content = array.reshape(-1).view(np.uint8)
        self.synchronize()
        for done in range(0, len(content), len(self._pinned.bytes)):
            part = content[done : done + len(self._pinned.bytes)]
            self._device.copy_out(self._pinned.address, address + done, len(part))
            self._device.synchronize()
            part[:] = self._pinned.bytes[: len(part)]
        return array

    def synchronize(self) -> None:
        """Wait for all enqueued work; the whole buffer is free then."""
        self._device.synchronize()
        self._used = 0

    def _room(self) -> int:
        """Where the next part may start."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start >= len(self._pinned.bytes):
            self.synchronize()
            return 0
        return start
