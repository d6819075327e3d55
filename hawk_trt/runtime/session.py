"""ONNX Runtime: sessions, device tensors and bindings.

Everything that crosses into a session is an OrtValue on its device, bound by name, so that a stage reads
what another wrote without a copy. On the CPU an OrtValue shares the memory of its numpy array.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from hawk_trt.bundle import GraphEntry, numpy_dtype
from hawk_trt.errors import BackendError
from hawk_trt.stages import VISION

# ONNX's TensorProto.DataType of the dtypes that the stages use
_ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
_ARENA_STEP = 256 << 20  # bytes
_ORT_ERRORS = tuple(
    value for value in vars(ort_errors).values() if isinstance(value, type) and issubclass(value, Exception)
)


class Device:
    """Where a session computes, and how tensors get there.

    Attributes:
        kind: "cpu" or "cuda".
        index: number of the GPU.
        threads: of the CPU for a session, None for one a core.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.threads = threads
        self.kind, _, index = device.partition(":")
        if self.kind not in ("cpu", "cuda") or not (index or "0").isdigit():
            raise BackendError(f'device: got {device!r}, expected "cpu", "cuda" or "cuda:N"')
        self.index = int(index or 0)
        if self.kind == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise BackendError(
                "device: this onnxruntime has no CUDA provider. "
                "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
            )
        if self.kind == "cuda":
            _preload_libraries()

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """Execution providers of a session. TF32 off: it rounds products to 10 bits and changes the kept set."""
        cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
        if self.kind == "cpu":
            return cpu
        options = {"device_id": str(self.index), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        return [("CUDAExecutionProvider", options), *cpu]

    def empty(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        """An uninitialised tensor."""
        if self.kind == "cpu":
            return self.upload(np.empty(shape, numpy_dtype(dtype)))
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ONNX_TYPES[dtype], self.kind, self.index)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        """A tensor of zeros."""
        return self.upload(np.zeros(shape, numpy_dtype(dtype)))

    def upload(self, array: npt.NDArray[Any]) -> ort.OrtValue:
        """The array on the device; on the CPU it shares the array's memory."""
        array = np.ascontiguousarray(array)
        if self.kind == "cpu":
            return _host_value(array)
        if array.dtype.name != "bfloat16":
            return ort.OrtValue.ortvalue_from_numpy(array, self.kind, self.index)
        value = self.empty(array.shape, "bfloat16")
        value.update_inplace(_host_value(array))
        return value

    def download(self, value: ort.OrtValue, dtype: str) -> npt.NDArray[Any]:
        """A host copy."""
        return np.array(self.peek(value, dtype))

    def peek(self, value: ort.OrtValue, dtype: str) -> npt.NDArray[Any]:
        """The tensor on the host. It may share the tensor's memory, and then is valid as long as that lives."""
        if dtype != "bfloat16":
            array: npt.NDArray[Any] = value.numpy()
            return array
        bits = np.empty(value.shape(), numpy_dtype(dtype))
        _host_value(bits).update_inplace(value)
        return bits

    def concatenate(self, parts: Sequence[ort.OrtValue], dtype: str) -> ort.OrtValue:
        """Tensors [rows, ..] one below the other; through the host where there are several."""
        if len(parts) == 1:
            return parts[0]
        return self.upload(np.concatenate([self.download(part, dtype) for part in parts]))


class Buffer:
    """A small input that changes every step: a host array and its device tensor at one address."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._host = np.zeros(shape, numpy_dtype(dtype))
        self._device = device
        self.value = device.upload(self._host)

    def set(self, values: npt.ArrayLike) -> None:
        """Write new values to the device."""
        self._host[...] = values
        if self._device.kind != "cpu":
            bits = self._host.dtype.name == "bfloat16"
            self.value.update_inplace(_host_value(self._host) if bits else self._host)


class Stage:
    """One graph, loaded."""

    def __init__(self, path: Path, entry: GraphEntry, device: Device) -> None:
        self.entry = entry
        self.device = device
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors alone: warnings go to stderr, which belongs to the progress bar
        # each stage has threads of its own: those of one would spin while the next computes
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = device.threads or 0  # 0 is ONNX Runtime's own choice
        if device.kind == "cpu":
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        # Planned blocks ask for new memory where the arena has holes: 0.5 GB at native resolution, and no faster.
        options.enable_mem_pattern = entry.stage != VISION
        with _translated(f"{path.name}: could not be loaded"):
            self.session = ort.InferenceSession(str(path), options, providers=device.providers())
        if device.kind == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError(
                "device: the CUDA provider could not start (driver, CUDA or cuDNN libraries missing). "
                "See: hawk-trt doctor"
            )

    def bind(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> "Binding":
        """Bind all inputs, and outputs to given tensors where there are, else to memory of ONNX Runtime's own."""
        binding = Binding(self)
        for spec in self.entry.inputs:
            binding.input(spec.name, inputs[spec.name])
        for spec in self.entry.outputs:
            binding.output(spec.name, outputs.get(spec.name))
        return binding

    def dtype(self, output: str) -> str:
        """Dtype name of an output."""
        return next(spec.dtype for spec in self.entry.outputs if spec.name == output)


class Binding:
    """Inputs and outputs of a stage, bound once and run many times."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._binding = stage.session.io_binding()
        self._outputs: list[str] = []
        self._inputs: dict[str, ort.OrtValue] = {}  # their arrays' memory is theirs, not the binding's
        self._options = ort.RunOptions()
        if stage.entry.stage == VISION and stage.device.kind == "cpu":
            # Images differ in size: else the arena holds on to what the largest took, gigabytes at native resolution.
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def input(self, name: str, value: ort.OrtValue) -> None:
        """Bind, or bind anew, an input."""
        self._inputs[name] = value
        self._binding.bind_ortvalue_input(name, value)

    def output(self, name: str, value: ort.OrtValue | None) -> None:
        """Bind, or bind anew, an output."""
        device = self._stage.device
        if value is None:
            self._binding.bind_output(name, device.kind, device.index)
        else:
            self._binding.bind_ortvalue_output(name, value)
        if name not in self._outputs:
            self._outputs.append(name)

    def run(self) -> None:
        """Run the stage.

        Raises:
            BackendError: ONNX Runtime failed, with its message.
        """
        with _translated(f"{self._stage.entry.file}: failed"):
            self._stage.session.run_with_iobinding(self._binding, self._options)

    def results(self) -> dict[str, ort.OrtValue]:
        """Outputs of the last run by name."""
        return dict(zip(self._outputs, self._binding.get_outputs(), strict=True))


def _host_value(array: npt.NDArray[Any]) -> ort.OrtValue:
    """An OrtValue over a contiguous array's memory; bfloat16, unknown to numpy, by its bits."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_TYPES["bfloat16"])
    return ort.OrtValue.ortvalue_from_numpy(array)


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions: each of its own would keep what its largest run took while the others run.

    It grows by _ARENA_STEP, and by more only for a tensor that needs it: steps of 1 GB, ONNX Runtime's default, hold
    several large tensors each, and a part that is still in use keeps the holes beside it.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"max_power_of_two_extend_bytes": _ARENA_STEP}))


@cache
def _preload_libraries() -> None:
    """Load the CUDA and cuDNN libraries of the nvidia-* packages, which the loader's path does not have."""
    with redirect_stdout(StringIO()):  # it prints what it does not find; the provider then says what it lacks
        ort.preload_dlls()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors into ours."""
    try:
        yield
    except _ORT_ERRORS as error:
        raise BackendError(f"{what}: {error}") from error
