"""The layer over the CUDA driver, and the TensorRT backend on it, with stand-ins for engines that enqueue real work.

The checks of CudaDevice are also tests, on the stand-in of the driver (tests/runtime/test_cuda_device.py). Then a whole
engine folder of the tiny model answers prompts: memory, uploads, execution contexts, the decode step captured and
replayed. Its engines compute no model: each mixes the bytes of all its inputs into its outputs, with the same integers
on the GPU and on the CPU, so that an answer is equal to the last bit exactly where every copy, every address and the
order of everything on the stream was right.
"""

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.gpu_report.record import ROOT, Failed, Record, Setting
from hawk_trt.errors import BackendError
from hawk_trt.request import PruningConfig, Result
from hawk_trt.stages import PORTABLE, TENSORRT

if TYPE_CHECKING:
    from cuda_standin import Driver
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice
    from tensorrt_standin import TensorRt

_PROMPTS = 3
_NEW_TOKENS = 8
_KEEP_RATIOS = (1.0, 0.2)
_UNREAD = ("slots", "context_slots")  # inputs of which only the length counts
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
# Prime, so that neighbouring values of a pattern differ; 251 / 256 is exact in every dtype.
_MODULUS = 251
_SUM_MODULUS = (1 << 31) - 1


def round_trip(device: "CudaDevice") -> None:
    """Pinned memory to the device, within it, and back; part of it zeroed on the way."""
    source, target = device.allocate_pinned(4096), device.allocate_pinned(4096)
    first, second = device.allocate(4096), device.allocate(4096)
    assert first % 256 == second % 256 == 0
    values = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    source.view(values.dtype)[:] = values.ravel()
    device.copy_in(first, source)
    device.copy(second, first, 4096)
    device.zero(second + 512, 512)
    device.copy_out(target, second)
    device.synchronize()
    values[1] = 0
    np.testing.assert_array_equal(target.view(values.dtype), values.ravel())
    device.upload(first, 2 * values)
    np.testing.assert_array_equal(device.download(first, values.shape, values.dtype), 2 * values)


def rows_to_rows(device: "CudaDevice") -> None:
    """Rows of one layout to those of another, in groups, as a new column goes into the KV cache."""
    from hawk_trt.runtime.tensorrt.cuda import Rows

    source = np.arange(1, 121, dtype=np.float32).reshape(3, 4, 10)  # groups, rows, values
    target = np.zeros((3, 6, 16), np.float32)
    first, second = device.allocate(source.nbytes), device.allocate(target.nbytes)
    device.upload(first, source)
    device.zero(second, target.nbytes)
    device.copy_rows(Rows(second + 5 * 4, 16 * 4, 6), Rows(first + 2 * 4, 10 * 4, 4), 5 * 4, 3, 3)
    target[:, :3, 5:10] = source[:, :3, 2:7]
    np.testing.assert_array_equal(device.download(second, target.shape, target.dtype), target)


def replay(device: "CudaDevice") -> None:
    """A captured copy reads its pinned source anew at every launch."""
    given, got = (device.allocate_pinned(64).view(np.int64) for _ in range(2))
    memory = device.allocate(64)

    def step() -> None:
        device.copy_in(memory, given)
        device.copy_out(got, memory)

    got[:] = -1
    graph = device.capture(step)
    device.synchronize()
    assert got.tolist() == [-1] * 8, "the capture ran"
    for number in range(3):
        given[:] = number
        graph.launch()
        device.synchronize()
        assert got.tolist() == [number] * 8
    graph.close()
    graph.close()


def refused_capture(device: "CudaDevice") -> None:
    """What waits cannot be captured; the stream works on after it."""
    message = "cuStreamSynchronize: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    try:
        device.capture(device.synchronize)
    except BackendError as error:
        assert message in str(error), f"got {error}, expected {message}"
    else:
        raise AssertionError("a capture that waits was accepted")

    def fails() -> None:
        raise ValueError("mine")

    try:
        device.capture(fails)
    except ValueError as error:
        assert str(error) == "mine"
    else:
        raise AssertionError("a capture that raises was accepted")
    replay(device)


def timed(device: "CudaDevice") -> None:
    """Events tell the time between them."""
    start, end = device.event(), device.event()
    memory = device.allocate(1 << 20)
    device.record(start)
    for _ in range(10):
        device.zero(memory, 1 << 20)
    device.record(end)
    device.synchronize()
    assert 0 < device.seconds(start, end) < 1


CHECKS: tuple[Callable[["CudaDevice"], None], ...] = (round_trip, rows_to_rows, replay, refused_capture, timed)


def driver(record: Record, setting: Setting) -> None:
    """Check CudaDevice, then the backend over stand-in engines, against the same backend on the stand-in driver."""
    sys.path.insert(0, str(ROOT / "tests"))  # the stand-ins
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if setting.rehearse:
            from trt_machine import Machines

            stack.enter_context(Machines())
        _check_device(record)
    for target in (PORTABLE, TENSORRT):
        with record.row_or_reason("backend", target=target) as row:
            expected, _ = _answers(target, setting, on_gpu=False)
            got, told = _answers(target, setting, on_gpu=not setting.rehearse)
            wrong = [number for number, (a, b) in enumerate(zip(got, expected, strict=True)) if not _same(a, b)]
            if wrong:
                raise RuntimeError(f"{len(wrong)} of {len(got)} answers differ from the stand-in driver's: {wrong}")
            row |= {"answers": len(got), **told}
    record.raise_failures("backend")


def _check_device(record: Record) -> None:
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    failures = []
    for check in CHECKS:
        with closing(CudaDevice(0)) as device, device.active():
            try:
                check(device)
            except AssertionError as error:
                failures.append(f"{check.__name__}: {error}")
    record.put(checks=[check.__name__ for check in CHECKS], failures=failures)
    if failures:
        raise Failed(failures[0])


def _bundle(setting: Setting) -> Path:
    from benchmarks.gpu_report.models import tiny_bundle

    return tiny_bundle("float16", setting)


def _answers(target: str, setting: Setting, *, on_gpu: bool) -> tuple[list[Result], dict[str, object]]:
    """Answers of an engine folder of mixing engines, on the real driver or on its stand-in, and what was counted."""
    import trt_machine
    from examples.tiny_task import generate
    from hawk_trt.pipeline import Pipeline

    with trt_machine.Machines() as machines:
        module = _mixing_tensorrt(machines.driver)
        if on_gpu:
            machines.patch.undo()  # the real driver, and the tensorrt module that mixes
            trt_machine._forget()
            module = _mixing_tensorrt(_RealDriver())
        machines.patch.setitem(sys.modules, "tensorrt", module)
        from hawk_trt.runtime.tensorrt.cuda import this_machine

        machines.patch.setattr(trt_machine, "machine", lambda version: this_machine(version))
        folder = setting.work / f"mixing-{target}-{'gpu' if on_gpu else 'host'}"
        trt_machine.engine_folder(_bundle(setting), folder, target)
        samples = list(generate(11, 1 if setting.small else _PROMPTS))
        results, steps = [], []
        with Pipeline.load(folder) as pipe:
            for sample in samples:
                for ratio in _KEEP_RATIOS:
                    result = pipe.generate(
                        sample.question,
                        [sample.image],
                        pruning=PruningConfig(ratio),
                        max_new_tokens=_NEW_TOKENS,
                        ignore_eos=True,
                        return_logits=True,
                    )
                    results.append(result)
                    steps.append(1e3 * result.timings.decode / (_NEW_TOKENS - 1))
            captures = pipe.backend.decode_step.captures
        gc.collect()
    faults = module.driver.faults
    if faults:
        raise RuntimeError(f"on the stand-in: {faults[0]}")
    return results, {"graphs_captured": captures, "decode_step_ms": round(statistics.median(steps), 3)}


def _same(got: Result, expected: Result) -> bool:
    assert got.logits is not None and expected.logits is not None
    return (
        got.token_ids == expected.token_ids
        and np.array_equal(got.kept_indices, expected.kept_indices)
        and np.array_equal(got.scores, expected.scores)
        and np.array_equal(got.logits, expected.logits)
    )


class _RealDriver:
    """What the stand-in of TensorRT asks of a driver, answered by the real one."""

    retained = True
    current = (True,)
    captured = None
    invalid = False

    def __init__(self) -> None:
        self.faults: list[str] = []

    @property
    def handles(self) -> "_RealDriver":
        """Every stream is one."""
        return self

    def __contains__(self, stream: int) -> bool:
        return stream != 0

    def block(self, address: int, _size: int) -> "_RealDriver | None":
        """Memory that holds a range."""
        return self if address else None

    def view(self, address: int, size: int) -> torch.Tensor:
        """Its bytes."""
        return _tensor(address, (size,), torch.uint8, "cuda")

    def put(self, _kind: str, work: Callable[[], object]) -> None:
        """Enqueue, or capture, at once."""
        work()


def _mixing_tensorrt(on: "Driver | _RealDriver") -> "TensorRt":
    """The stand-in of TensorRT, its engines mixing bytes on the stream that they are given."""
    import tensorrt_standin

    class Context(tensorrt_standin.Context):
        def execute_async_v3(self, stream: int) -> bool:
            self.stream = stream
            return bool(super().execute_async_v3(stream))

        def _run(self, tensors: list[tuple[str, str, tuple[int, ...], int]], label: tuple[str, int]) -> bool:
            real = isinstance(on, _RealDriver)
            device = "cuda" if real else "cpu"
            named = {name: _tensor(at, shape, _DTYPES[dtype], device) for name, dtype, shape, at in tensors}
            with ExitStack() as stack:
                if real:
                    stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(self.stream)))
                on.block(*self.scratch).view(*self.scratch)[:] = 0xFF
                _mix(named, self.engine.inputs)
            self.module.enqueues.append(label)
            return True

    class Engine(tensorrt_standin.Engine):
        def create_execution_context(self, _strategy: str) -> Context:
            return Context(self)

    class Runtime(tensorrt_standin.Runtime):
        def deserialize_cuda_engine(self, plan: memoryview) -> Engine | None:
            engine = super().deserialize_cuda_engine(plan)
            if engine is not None:
                engine.__class__ = Engine
            return engine

    module = tensorrt_standin.TensorRt(on)
    module.Runtime = lambda log: Runtime(module, log)
    return module


def _mix(named: dict[str, torch.Tensor], inputs: list[str]) -> None:
    """Outputs from the bytes of all inputs; nothing here waits for the GPU, so it can be captured."""
    device = next(iter(named.values())).device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name in inputs:
        if name not in _UNREAD:
            own = named[name].contiguous().view(-1).view(torch.uint8)
            own = (own if len(own) % 4 else own.view(torch.int32)).to(torch.int64)
            weights = torch.arange(len(own), device=device) % _MODULUS + 1
            total = (31 * total + (own * weights).sum()) % _SUM_MODULUS
    outputs = {name: tensor for name, tensor in named.items() if name not in inputs}
    for number, (name, target) in enumerate(outputs.items()):
        if name == "kept_indices":  # the last positions: ascending, as a selection is
            seq_len = named["select_bias"].shape[-1]
            target.copy_(torch.arange(seq_len - target.shape[-1], seq_len, device=device).expand(target.shape))
        elif name == "next_token":
            vocab = named["logits"].shape[-1]
            target.copy_((total + torch.arange(len(target), device=device)) % vocab)
        elif name.startswith("present_"):
            _write_cache(named, name, total + number)
        else:
            target.copy_(_pattern(total + number, tuple(target.shape), target.dtype))


def _write_cache(named: dict[str, torch.Tensor], name: str, total: torch.Tensor) -> None:
    """New columns of a cache: at write_index in place, else all of the output."""
    target, past = named[name], named[name.replace("present_", "past_")]
    new = named["hidden_states"].shape[1]
    batch, kv_heads, _, head_dim = target.shape
    values = _pattern(total, (batch, kv_heads, new, head_dim), target.dtype)
    if target.data_ptr() != past.data_ptr():
        target.copy_(values)
        return
    places = named["write_index"][:, None] + torch.arange(new, device=target.device)
    target.scatter_(2, places[:, None, :, None].expand(batch, kv_heads, new, head_dim), values)


def _pattern(total: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = (total + 7 * torch.arange(int(np.prod(shape)), device=total.device)) % _MODULUS
    return (numbers if not dtype.is_floating_point else numbers / 256).to(dtype).view(shape)


@cache  # so that nothing is asked of CUDA while it captures
def _tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor over memory that is there already."""
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device=device)
    if device == "cpu":
        held = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return torch.from_numpy(held).view(dtype).view(shape)

    told = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
    held = type("Held", (), {"__cuda_array_interface__": told})()
    return torch.as_tensor(held, device=device).view(dtype).view(shape)
