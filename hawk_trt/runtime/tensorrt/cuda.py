"""One GPU through the CUDA driver: its primary context, a stream, memory, copies, events and graphs.

Every status that the driver returns goes through `call`, which turns a failure into a BackendError with the
driver's name for it. A CudaDevice owns all that was taken through it, and gives it all back when it is closed.
The primary context is retained, not made: it is the one that the runtime API, TensorRT and PyTorch use.

Arrays of any size go up and down in parts through one pinned buffer: pinned memory is what a copy engine reads without
the CPU, and what a captured copy may name.
"""

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from hawk_trt.engine_folder import ALIGNMENT, Machine
from hawk_trt.errors import BackendError

# Of the pinned buffer.
STAGING_BYTES = 16 << 20
_NAME_BYTES = 256
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_GIB = float(1 << 30)


class CudaError(BackendError):
    """A call into the driver failed; status: the driver's name, such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


def call(function: str, *arguments: object) -> Any:  # noqa: ANN401 - what a driver function returns depends on which
    """Call a function of the driver by its name; returns what it gives beside its status: None, one value, or a list.

    Raises CudaError: a status other than success; BackendError: no driver on this machine.
    """
    try:
        status, *values = getattr(driver, function)(*arguments)
    except RuntimeError as error:  # cuda-bindings raises it where it finds no driver library
        raise BackendError(f"GPU: no NVIDIA driver was found ({error}). See: hawk-trt doctor") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else "unknown"
        raise CudaError(f"{function}: {status.name} ({reason})", status.name)
    return values[0] if len(values) == 1 else (values or None)


class Rows(NamedTuple):
    """Rows of bytes in device memory: so many bytes from row to row, so many rows from one group to the next."""

    address: int
    pitch: int
    per_group: int


class Graph:
    """A captured sequence of work, launched with one call."""

    def __init__(self, executable: object, stream: object) -> None:
        self._executable, self._stream = executable, stream

    def launch(self) -> None:
        call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Release it. It must not be running."""
        executable, self._executable = self._executable, None
        if executable is not None:
            call("cuGraphExecDestroy", executable)


class CudaDevice:
    """One GPU. Work goes to one stream, in order; use `active` around every use from outside.

    stream: its handle, as TensorRT takes it. Raises BackendError: no driver, no such GPU, or no context on it.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._staged = 0  # bytes of the pinned buffer that enqueued copies may still read
        self._releases = ExitStack()  # undoes each thing taken, the last first
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
        if not 0 <= index < count:
            raise BackendError(f"device: got cuda:{index}, this machine has {count} GPU{'s' * (count != 1)}")
        device = call("cuDeviceGet", index)
        self._context = call("cuDevicePrimaryCtxRetain", device)
        self.on_close(call, "cuDevicePrimaryCtxRelease", device)
        self.on_close(call, "cuCtxPopCurrent")
        self._open = True
        try:
            with self.active():
                # Not tied to the legacy stream, so that others' work there neither waits nor is waited for.
                self._stream = call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
                self.on_close(call, "cuStreamDestroy", self._stream)
                self._staging = self.allocate_pinned(STAGING_BYTES)  # what upload and download go through
        except BaseException:
            self.close()
            raise
        self.stream = int(self._stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make its context the thread's current one, then put back the one before; BackendError where it is closed."""
        if not self._open:
            raise BackendError(f"cuda:{self.index}: closed, expected a model that is still open")
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def allocate(self, size_bytes: int) -> int:
        """Device memory at a multiple of 256; BackendError where there is too little, with how much is free."""
        try:
            memory = call("cuMemAlloc", max(size_bytes, 1))
        except CudaError as error:
            if error.status != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            free, total = call("cuMemGetInfo")
            raise BackendError(
                f"GPU memory: got {free / _GIB:.2f} GiB free of {total / _GIB:.2f}, "
                f"expected {size_bytes / _GIB:.2f} for caches and tensors. "
                "Close what else uses the GPU, or build engines with a smaller --max-context or --max-prompt-tokens"
            ) from error
        self.on_close(call, "cuMemFree", memory)
        return int(memory)

    def allocate_pinned(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Page-locked host memory, which the GPU copies from and to without the CPU: uint8 [size_bytes]."""
        address = int(call("cuMemAllocHost", size_bytes))
        self.on_close(call, "cuMemFreeHost", address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def event(self) -> object:
        """An event, for `record` and `seconds`."""
        event = call("cuEventCreate", int(driver.CUevent_flags.CU_EVENT_DEFAULT))
        self.on_close(call, "cuEventDestroy", event)
        return event

    def record(self, event: object) -> None:
        """Let an event stand for the work enqueued so far."""
        call("cuEventRecord", event, self._stream)

    def seconds(self, start: object, end: object) -> float:
        """Time from one event to another, both reached."""
        return float(call("cuEventElapsedTime", start, end)) / 1000.0

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueue a copy of an array to the device; the array may change as soon as this returns."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer, done = self._staging, 0
        while done < len(content):
            start = -(-self._staged // ALIGNMENT) * ALIGNMENT
            if start >= len(buffer):
                self.synchronize()
                start = 0
            part = content[done : done + len(buffer) - start]
            buffer[start : start + len(part)] = part
            self.copy_in(address + done, buffer[start : start + len(part)])
            self._staged = start + len(part)
            done += len(part)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A host copy of a tensor, after all enqueued work."""
        array = np.empty(shape, dtype)
        content = array.reshape(-1).view(np.uint8)
        buffer = self._staging
        self.synchronize()
        for done in range(0, len(content), len(buffer)):
            part = content[done : done + len(buffer)]
            self.copy_out(buffer[: len(part)], address + done)
            self.synchronize()
            part[:] = buffer[: len(part)]
        return array

    def copy_in(self, target: int, source: npt.NDArray[Any]) -> None:
        """Enqueue a copy from pinned to device memory."""
        call("cuMemcpyHtoDAsync", target, source.ctypes.data, source.nbytes, self._stream)

    def copy_out(self, target: npt.NDArray[Any], source: int) -> None:
        """Enqueue a copy from device to pinned memory."""
        call("cuMemcpyDtoHAsync", target.ctypes.data, source, target.nbytes, self._stream)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Enqueue a copy within device memory."""
        call("cuMemcpyDtoDAsync", target, source, size_bytes, self._stream)

    def copy_rows(self, target: Rows, source: Rows, size_bytes: int, rows: int, groups: int) -> None:
        """Enqueue a copy within device memory of the first bytes of the first rows of each group."""
        copy = driver.CUDA_MEMCPY3D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch, copy.srcHeight = source
        copy.dstDevice, copy.dstPitch, copy.dstHeight = target
        copy.WidthInBytes, copy.Height, copy.Depth = size_bytes, rows, groups
        call("cuMemcpy3DAsync", copy, self._stream)

    def zero(self, address: int, size_bytes: int) -> None:
        """Enqueue the zeroing of device memory."""
        call("cuMemsetD8Async", address, 0, size_bytes, self._stream)

    def zero_each(self, address: int, stride: int, size_bytes: int, count: int) -> None:
        """Enqueue the zeroing of so many stretches of device memory, each `stride` bytes behind the one before."""
        call("cuMemsetD2D8Async", address, stride, 0, size_bytes, count, self._stream)

    def synchronize(self) -> None:
        """Wait for all enqueued work. Raises BackendError: some of it failed."""
        call("cuStreamSynchronize", self._stream)
        self._staged = 0

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what a function enqueues, without running it; BackendError where something cannot be captured."""
        # Other threads may go on allocating; what this one enqueues must be capturable.
        call("cuStreamBeginCapture", self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(self._stream)  # leaves capture mode; its failure is known already
            if graph is not None and int(graph):
                call("cuGraphDestroy", graph)
            raise
        graph = call("cuStreamEndCapture", self._stream)
        try:
            return Graph(call("cuGraphInstantiate", graph, 0), self._stream)
        finally:
            call("cuGraphDestroy", graph)

    def on_close(self, release: Callable[..., object], *arguments: object) -> None:
        """Let a function run when the device is closed, before those given earlier, its context current."""
        self._releases.callback(release, *arguments)

    def close(self) -> None:
        """Give back everything, the last taken first, whatever fails on the way. Closing again does nothing.

        Raises BackendError: something could not be released, and no other error is on its way.
        """
        if not self._open:
            return
        self._open, under_way = False, sys.exc_info()[0]
        self.on_close(call, "cuCtxPushCurrent", self._context)  # the first to run
        try:
            self._releases.close()
        except BackendError:
            if under_way is None:
                raise


def this_machine(tensorrt: str, device: int = 0) -> Machine:
    """This machine as plans see it, with no context on its GPU; BackendError without a driver or such a GPU."""
    call("cuInit", 0)
    handle = call("cuDeviceGet", device)
    attribute = driver.CUdevice_attribute
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
    name: bytes = call("cuDeviceGetName", _NAME_BYTES, handle)
    cuda: int = call("cuDriverGetVersion")
    told = _DRIVER_FILE.read_text(encoding="utf-8") if _DRIVER_FILE.is_file() else ""
    version = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", told)
    return Machine(
        tensorrt=tensorrt,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=None if version is None else version.group(1),
        gpu=name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
    )


def shares_memory(device: int = 0) -> bool:
    """Whether a GPU's memory is the machine's own, as on a Jetson."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
    return bool(call("cuDeviceGetAttribute", attribute, call("cuDeviceGet", device)))
