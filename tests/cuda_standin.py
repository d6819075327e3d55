"""A stand-in for cuda-bindings' driver module: device memory is host memory, and work waits in a queue until the
stream is synchronised, as on a GPU. What the driver refuses is refused; what it lets happen silently, such as
use after free or a copy from memory that is not pinned, is refused too.
"""

# ruff: noqa: ARG002, N802 - the names and arguments are the driver's
import enum
import itertools
import time
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np

ALIGNMENT = 256
_GARBAGE = 0xFF  # NaN in every float dtype, so that what nobody wrote is seen


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Flags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1
    CU_EVENT_DEFAULT = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class Block:
    """One allocation."""

    def __init__(self, size, pinned):
        self.storage = np.full(size + ALIGNMENT, _GARBAGE, np.uint8)
        self.address = -(-self.storage.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.offset = self.address - self.storage.ctypes.data
        self.size = size
        self.pinned = pinned

    def view(self, address, size):
        start = address - self.address + self.offset
        return self.storage[start : start + size]


class Driver(ModuleType):
    """cuda.bindings.driver over host memory.

    Attributes:
        calls: how often each function was called.
        enqueued: work put on the stream, that of graphs included.
        moved: bytes copied and set, by the kind of work.
        faults: what no caller may do and no status tells.
        fail: function name -> [calls left before it fails, status].
        capacity: bytes of device memory.
        integrated: whether that is the machine's own.
        capability: the compute capability, in two numbers.
    """

    def __init__(self, gpus=1):
        super().__init__("cuda.bindings.driver")
        self.CUresult = CUresult
        self.CUDA_MEMCPY3D, self.CUmemorytype = SimpleNamespace, SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
        self.CUstream_flags = self.CUevent_flags = self.CUstreamCaptureMode = self.CUdevice_attribute = Flags
        self.gpus, self.capacity, self.integrated = gpus, 1 << 40, False
        self.capability = (9, 0)
        self.calls, self.enqueued, self.faults, self.fail = Counter(), Counter(), [], {}
        self.moved = Counter()
        self.retained, self.current, self.sticky = 0, [], None
        self.blocks, self.handles = {}, {}
        self.queue, self.captured, self.invalid = [], None, False
        self._numbers = itertools.count(0x1000)
        self.__all__ = [name for name in dir(type(self)) if name.startswith("cu")]

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return self._checked(name, value) if name.startswith("cu") and callable(value) else value

    def _checked(self, name, function):
        def call(*arguments):
            self.calls[name] += 1
            if name in self.fail:
                self.fail[name][0] -= 1
                if self.fail[name][0] < 0:
                    return self.fail[name][1], None
            if self.sticky is not None and name not in ("cuGetErrorString", "cuCtxPushCurrent", "cuCtxPopCurrent"):
                return self.sticky, None
            free = ("cuInit", "cuDevice", "cuGetErrorString", "cuDriverGetVersion", "cuCtx")
            if not name.startswith(free) and not (self.current and self.retained):
                return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
            return function(*arguments)

        return call

    # -- what tests ask

    def live(self):
        """What is taken and not given back."""
        kinds = Counter(kind for kind, _ in self.handles.values())
        kinds += Counter("pinned" if block.pinned else "device" for block in self.blocks.values())
        return dict(kinds) | ({"context": self.retained} if self.retained else {})

    def block(self, address, size, pinned=False):
        """The allocation that holds a range, None where none does."""
        for block in self.blocks.values():
            if block.pinned == pinned and block.address <= address and address + size <= block.address + block.size:
                return block
        return None

    def put(self, kind, work):
        """Enqueue work, or record it where the stream is captured."""
        self.enqueued[kind] += self.captured is None
        (self.queue if self.captured is None else self.captured).append((kind, work))

    def drain(self):
        """Run the queue; a failure of work sticks, as on a GPU."""
        queue, self.queue = self.queue, []
        for _, work in queue:
            if self.sticky is None and work() is False:
                self.sticky = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        return self.sticky or CUresult.CUDA_SUCCESS

    def _new(self, kind, value=None):
        handle = next(self._numbers)
        self.handles[handle] = (kind, value)
        return handle

    def _drop(self, kind, handle):
        if self.handles.get(handle, ("", None))[0] != kind:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        del self.handles[handle]
        return (CUresult.CUDA_SUCCESS,)

    def _uncapturable(self):
        if self.captured is None:
            return None
        self.invalid = True
        return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

    # -- devices and contexts

    def cuInit(self, flags):
        return (CUresult.CUDA_SUCCESS,)

    def cuGetErrorString(self, status):
        return CUresult.CUDA_SUCCESS, status.name.lower().encode()

    def cuDeviceGetCount(self):
        return CUresult.CUDA_SUCCESS, self.gpus

    def cuDeviceGet(self, index):
        return CUresult.CUDA_SUCCESS, index

    def cuDeviceGetName(self, size, device):
        return CUresult.CUDA_SUCCESS, b"Stand-in".ljust(size, b"\0")

    def cuDeviceGetAttribute(self, attribute, device):
        major, minor = self.capability
        return CUresult.CUDA_SUCCESS, {Flags(18): int(self.integrated), Flags(75): major, Flags(76): minor}[attribute]

    def cuDriverGetVersion(self):
        return CUresult.CUDA_SUCCESS, 13000

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return CUresult.CUDA_SUCCESS, ("context", device)

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context):
        if not self.retained:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self.current.append(context)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        if not self.current:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return CUresult.CUDA_SUCCESS, self.current.pop()

    # -- memory

    def cuMemGetInfo(self):
        used = sum(block.size for block in self.blocks.values() if not block.pinned)
        return CUresult.CUDA_SUCCESS, self.capacity - used, self.capacity

    def cuMemAlloc(self, size):
        return self._allocate(size, pinned=False)

    def cuMemAllocHost(self, size):
        return self._allocate(size, pinned=True)

    def _allocate(self, size, *, pinned):
        refused = self._uncapturable()
        if refused or not size:
            return refused or CUresult.CUDA_ERROR_INVALID_VALUE, None
        if not pinned and size > self.cuMemGetInfo()[1]:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        block = Block(size, pinned)
        self.blocks[block.address] = block
        return CUresult.CUDA_SUCCESS, block.address

    def cuMemFree(self, address):
        return self._free(address, pinned=False)

    def cuMemFreeHost(self, address):
        return self._free(address, pinned=True)

    def _free(self, address, *, pinned):
        refused = self._uncapturable()
        if refused:
            return (refused,)
        self.drain()  # freeing waits
        block = self.blocks.get(address)
        if block is None or block.pinned != pinned:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        block.storage[:] = _GARBAGE
        del self.blocks[address]
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        return self._copy("copy in", (target, False), (source, True), size, stream)

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        return self._copy("copy out", (target, True), (source, False), size, stream)

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        return self._copy("copy", (target, False), (source, False), size, stream)

    def _copy(self, kind, target, source, size, stream):
        def work():
            to, of = (self.block(address, size, pinned) for address, pinned in (target, source))
            if to is None or of is None:
                return False
            to.view(target[0], size)[:] = of.view(source[0], size)
            self.moved[kind] += size
            return True

        if stream not in self.handles or any(self.block(a, size, p) is None for a, p in (target, source)):
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.put(kind, work)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpy3DAsync(self, copy, stream):
        def size(pitch, height):
            return ((copy.Depth - 1) * height + copy.Height - 1) * pitch + copy.WidthInBytes

        def starts(pitch, height):
            return [(group * height + row) * pitch for group in range(copy.Depth) for row in range(copy.Height)]

        to, of = (copy.dstDevice, copy.dstPitch, copy.dstHeight), (copy.srcDevice, copy.srcPitch, copy.srcHeight)

        def work():
            blocks = [self.block(address, size(*steps)) for address, *steps in (to, of)]
            if None in blocks:
                return False
            for target, source in zip(starts(*to[1:]), starts(*of[1:]), strict=True):
                blocks[0].view(to[0] + target, copy.WidthInBytes)[:] = blocks[1].view(of[0] + source, copy.WidthInBytes)
            self.moved["copy rows"] += copy.WidthInBytes * copy.Height * copy.Depth
            return True

        fits = all(copy.WidthInBytes <= pitch and copy.Height <= height for _, pitch, height in (to, of))
        if stream not in self.handles or not fits or None in [self.block(a, size(*steps)) for a, *steps in (to, of)]:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.put("copy rows", work)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, address, value, size, stream):
        return self._set(address, size, value, size, 1, stream)

    def cuMemsetD2D8Async(self, address, pitch, value, width, height, stream):
        return self._set(address, pitch, value, width, height, stream)

    def _set(self, address, pitch, value, width, height, stream):
        size = pitch * (height - 1) + width

        def work():
            block = self.block(address, size)
            if block is None:
                return False
            for row in range(height):
                block.view(address + row * pitch, width)[:] = value
            self.moved["memset"] += width * height
            return True

        if stream not in self.handles or self.block(address, size) is None or not width <= pitch:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.put("memset", work)
        return (CUresult.CUDA_SUCCESS,)

    # -- streams, events, graphs

    def cuStreamCreate(self, flags):
        return CUresult.CUDA_SUCCESS, self._new("stream")

    def cuStreamDestroy(self, stream):
        return self._drop("stream", stream)

    def cuStreamSynchronize(self, stream):
        return (self._uncapturable() or self.drain(),)

    def cuEventCreate(self, flags):
        return CUresult.CUDA_SUCCESS, self._new("event", [None])

    def cuEventDestroy(self, event):
        return self._drop("event", event)

    def cuEventRecord(self, event, stream):
        cell = self.handles[event][1]
        cell[0] = None
        self.put("event", lambda: cell.__setitem__(0, time.perf_counter()))
        return (CUresult.CUDA_SUCCESS,)

    def cuEventElapsedTime(self, start, end):
        begun, ended = self.handles[start][1][0], self.handles[end][1][0]
        if begun is None or ended is None:
            return CUresult.CUDA_ERROR_NOT_READY, None
        return CUresult.CUDA_SUCCESS, 1000.0 * (ended - begun)

    def cuStreamBeginCapture(self, stream, mode):
        self.captured, self.invalid = [], False
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        captured, self.captured = self.captured, None
        if captured is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        if self.invalid:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return CUresult.CUDA_SUCCESS, self._new("graph", captured)

    def cuGraphDestroy(self, graph):
        return self._drop("graph", graph)

    def cuGraphInstantiate(self, graph, flags):
        return CUresult.CUDA_SUCCESS, self._new("executable", list(self.handles[graph][1]))

    def cuGraphExecDestroy(self, executable):
        return self._drop("executable", executable)

    def cuGraphLaunch(self, executable, stream):
        kind, work = self.handles.get(executable, ("", None))
        if kind != "executable":
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        self.enqueued.update(f"{name} (graph)" for name, _ in work)
        self.queue += work
        return (CUresult.CUDA_SUCCESS,)
