"""ONNX Runtime: devices, sessions, bindings, and the decode step that is bound once and run for every token.

Everything that crosses into a session is an OrtValue on its device, bound by name, so that a stage reads what another
wrote without a copy. On the CPU an OrtValue shares the memory of its numpy array.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from hawk_trt.bundle import GraphEntry, numpy_dtype
from hawk_trt.errors import BackendError
from hawk_trt.runtime.versions import DEVICE_COPIES_ONNX_RUNTIME, OPSET_24_ONNX_RUNTIME, at_least
from hawk_trt.stages import BIAS_KEEP, DECODER, FIRST_LAYER, VISION, in_place

# Tensors by name.
Values: TypeAlias = Mapping[str, ort.OrtValue]
# ONNX's TensorProto.DataType of the dtypes that the stages use
_ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
_DTYPES = {number: name for name, number in _ONNX_TYPES.items()}
_ARENA_STEP = 256 << 20  # bytes
# FlashAttention, memory-efficient and plain attention: not cuDNN's, which takes 0.1 s to plan each new prompt length.
ATTENTION_KERNELS = "19"
_GRAPH_OPTION, _NO_GRAPH = "gpu_graph_id", "-1"
_ORT_ERRORS = tuple(
    value for value in vars(ort_errors).values() if isinstance(value, type) and issubclass(value, Exception)
)


class Device:
    """Where a session computes, and how tensors get there: kind "cpu", or "cuda" and the index of the GPU.

    threads: of the CPU for a session, None for one a core.  capture: whether decode steps run as CUDA graphs where they
    can.  num_captured: decode steps captured so far.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.threads = threads
        self.capture = True
        self.num_captured = 0
        self.kind, _, index = device.partition(":")
        if self.kind not in ("cpu", "cuda") or not (index or "0").isdigit():
            raise BackendError(f'device: got {device!r}, expected "cpu", "cuda" or "cuda:N"')
        self.index = int(index or 0)
        if self.kind == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise BackendError(
                    "device: this onnxruntime has no CUDA provider. "
                    "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
                )
            if not at_least(ort.__version__, DEVICE_COPIES_ONNX_RUNTIME):
                raise BackendError(
                    f"onnxruntime-gpu: got {ort.__version__}, which copies nothing on the device; expected "
                    f"{DEVICE_COPIES_ONNX_RUNTIME} or newer. pip install "
                    f"'onnxruntime-gpu>={OPSET_24_ONNX_RUNTIME[self.kind]}', or take device=\"cpu\""
                )
            _preload_libraries()

    def providers(self, *, capture: bool) -> list[tuple[str, dict[str, str]]]:
        """Execution providers of a session, for captured runs or not; TF32 is off: its 10 bits change the kept set."""
        cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
        if self.kind == "cpu":
            return cpu
        options = {"device_id": str(self.index), "use_tf32": "0", "sdpa_kernel": ATTENTION_KERNELS}
        options["arena_extend_strategy"] = "kSameAsRequested"
        return [("CUDAExecutionProvider", options | ({"enable_cuda_graph": "1"} if capture else {})), *cpu]

    def empty(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        """An uninitialised tensor."""
        if self.kind == "cpu":
            return _host_value(np.empty(shape, numpy_dtype(dtype)))
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ONNX_TYPES[dtype], self.kind, self.index)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        """A tensor of zeros."""
        return self.upload(np.zeros(shape, numpy_dtype(dtype)))

    def upload(self, array: npt.NDArray[Any]) -> ort.OrtValue:
        """The array on the device; on the CPU it shares the array's memory."""
        array = np.ascontiguousarray(array)
        if self.kind == "cpu":
            return _host_value(array)
        value = self.empty(array.shape, array.dtype.name)
        if array.size:
            write(value, array)
        return value


def write(value: ort.OrtValue, data: "npt.NDArray[Any] | ort.OrtValue") -> None:
    """Copy a host array, or a tensor on the same device, of the tensor's shape and dtype into the tensor's memory."""
    if value.device_name() == "cpu":  # ONNX Runtime below 1.26 takes arrays alone
        value.numpy()[...] = data if isinstance(data, np.ndarray) else data.numpy()
    else:
        value.update_inplace(_host_value(np.ascontiguousarray(data)) if isinstance(data, np.ndarray) else data)


def download(value: ort.OrtValue) -> npt.NDArray[Any]:
    """A host copy."""
    if value.element_type() != _ONNX_TYPES["bfloat16"]:
        return np.array(value.numpy())
    bits = np.empty(value.shape(), numpy_dtype("bfloat16"))
    _host_value(bits).update_inplace(value)
    return bits


class Stage:
    """One graph, loaded; can_capture: whether its runs can be CUDA graphs."""

    def __init__(self, path: Path, entry: GraphEntry, device: Device) -> None:
        self.entry, self.device = entry, device
        self.can_capture = device.kind == "cuda" and entry.stage != VISION and in_place(entry.target)
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
        if str(path).encode(errors="replace") != os.fsencode(path):
            raise BackendError(f"{path.parent}: ONNX Runtime opens no path that is not UTF-8. Rename the folder")
        with translated(f"{path.name}: could not be loaded"):
            self.session = ort.InferenceSession(
                str(path), options, providers=device.providers(capture=self.can_capture)
            )
        if device.kind == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError(
                "device: the CUDA provider could not start (driver, CUDA or cuDNN libraries missing). "
                "See: hawk-trt doctor"
            )

    def run(self, inputs: Values, outputs: Values | None = None) -> dict[str, ort.OrtValue]:
        """Run once: outputs by name, in given tensors where there are, else in memory of ONNX Runtime's own."""
        binding = Binding(self, inputs, outputs or {})
        binding.run()
        return binding.results()

    def view(self, tensor: ort.OrtValue, offset: int, shape: tuple[int, ...]) -> ort.OrtValue:
        """A tensor over part of another's memory, which must live as long. offset: elements.

        ONNX Runtime makes such a tensor for the output of a binding alone, so one is bound and never run.
        """
        dtype = _DTYPES[tensor.element_type()]
        kind = _ONNX_TYPES[dtype] if dtype == "bfloat16" else numpy_dtype(dtype)
        at = tensor.data_ptr() + offset * (tensor.tensor_size_in_bytes() // math.prod(tensor.shape()))
        binding = self.session.io_binding()
        binding.bind_output(self.entry.outputs[0].name, self.device.kind, self.device.index, kind, list(shape), at)
        view: ort.OrtValue = binding.get_outputs()[0]
        return view


class Binding:
    """Inputs and outputs of a stage, bound once and run many times."""

    _graphs = itertools.count(1)

    def __init__(self, stage: Stage, inputs: Values, outputs: Values) -> None:
        self._stage, self._graph = stage, ""
        self._binding = stage.session.io_binding()
        self._inputs, self._outputs = dict(inputs), outputs  # their memory is theirs, not the binding's
        for spec in stage.entry.inputs:
            self._binding.bind_ortvalue_input(spec.name, inputs[spec.name])
        for spec in stage.entry.outputs:
            if spec.name in outputs:
                self._binding.bind_ortvalue_output(spec.name, outputs[spec.name])
            else:
                self._binding.bind_output(spec.name, stage.device.kind, stage.device.index)
        self._options = ort.RunOptions()
        if stage.can_capture:
            self._options.add_run_config_entry(_GRAPH_OPTION, _NO_GRAPH)
        elif stage.entry.stage == VISION and stage.device.kind == "cpu":
            # Images differ in size: else the arena holds on to what the largest took, gigabytes at native resolution.
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._captured = self._options

    def run(self, *, captured: bool = False) -> None:
        """Run the stage. captured: as a CUDA graph, made by the first such run: addresses and sizes must stay after it.

        Raises BackendError, with ONNX Runtime's message, where it fails or cannot be captured.
        """
        if captured and not self._graph:
            self._graph = str(next(Binding._graphs))
            self._captured = ort.RunOptions()
            self._captured.add_run_config_entry(_GRAPH_OPTION, self._graph)
        with translated(f"{self._stage.entry.file}: failed{' as a CUDA graph' if captured else ''}"):
            options = self._captured if captured else self._options
            self._stage.session.run_with_iobinding(self._binding, options)

    def forget_graph(self) -> None:
        """Give the memory of the captured graph back, where this ONNX Runtime can."""
        if self._graph and hasattr(self._stage.session, "release_captured_graph"):
            self._stage.session.release_captured_graph(int(self._graph))
        self._graph = ""

    def results(self) -> dict[str, ort.OrtValue]:
        """Outputs of the last run by name."""
        names = [spec.name for spec in self._stage.entry.outputs]
        return dict(zip(names, self._binding.get_outputs(), strict=True))


class DecodeStep:
    """One token of each of the first rows of a KV cache, in both language stages.

    All of it stands still in memory, so a GPU captures the second run in place as a CUDA graph and replays it.
    tensors: inputs and outputs of both stages by name, but for the cache.
    """

    def __init__(self, stages: Mapping[str, Stage], count: int, caches: Mapping[str, tuple[Values, Values]]) -> None:
        """Bind both stages over so many rows; caches: what each takes and gives of the KV cache."""
        first, decoder = stages[FIRST_LAYER], stages[DECODER]
        self._place = first.device
        self._can_capture = first.can_capture and decoder.can_capture
        own_columns = () if in_place(first.entry.target) else ("present_key", "present_value")
        dims = {"batch": count, "num_text": count, "num_visual": 1, "seq_len": 1, "num_kept_total": 1}
        self.tensors = {
            spec.name: self._place.zeros(
                tuple(dims[size] if isinstance(size, str) else size for size in spec.shape), spec.dtype
            )
            for spec in (*first.entry.inputs, *first.entry.outputs, *decoder.entry.outputs)
            if "." not in spec.name or spec.name.startswith(own_columns)
        }
        write(self.tensors["source_rows"], -1 - np.arange(count, dtype=np.int64)[:, None])
        write(self.tensors["select_bias"], np.full((count, 1), BIAS_KEEP, np.float32))
        self._bindings = {
            name: Binding(stages[name], self.tensors | dict(past), self.tensors | dict(present))
            for name, (past, present) in caches.items()
        }
        self._warm = self._captured = False

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Run both stages, or BackendError; inputs: what is new in this step, by name; not every target takes all."""
        for name in inputs.keys() & self.tensors.keys():
            write(self.tensors[name], inputs[name])
        if self._warm and self._can_capture and self._place.capture:
            try:
                for binding in self._bindings.values():
                    binding.run(captured=True)
            except BackendError as error:
                if self._captured:
                    raise
                self._place.capture = False
                warnings.warn(f"decode runs without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)
            else:
                self._place.num_captured += not self._captured
                self._captured = True
                return
        for binding in self._bindings.values():
            binding.run()
        self._warm = True

    def forget_graphs(self) -> None:
        """Give the memory of captured graphs back."""
        for binding in self._bindings.values():
            binding.forget_graph()


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
def translated(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors into ours."""
    try:
        yield
    except _ORT_ERRORS as error:
        if "bad_alloc" in str(error):
            error = MemoryError("not enough memory. See what is free: hawk-trt doctor")
        raise BackendError(f"{what}: {error}") from error
