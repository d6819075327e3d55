"""Plans and execution contexts: every bool, None and name that TensorRT returns is checked here.

A context is one optimization profile of one plan. It is told its shapes and addresses by `bind` and runs with
`enqueue`. TensorRT's methods return False or None and give the reason to a logger, which errors quote.
"""

import mmap
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import tensorrt as trt

from hawk_trt.bundle import TensorEntry
from hawk_trt.engine_folder import ALIGNMENT, EngineFolder, PlanEntry
from hawk_trt.errors import BackendError

_MESSAGES_KEPT = 8
_SERIOUS = ("INTERNAL_ERROR", "ERROR", "WARNING")
_FLOATS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # others are named alike
_PLUGIN = ("WeightedTopK", "1", "")  # name, version, namespace
# What to build with where a dimension is too large.
_FLAGS = {
    "batch": "--batch",
    "seq_len": "--max-prompt-tokens",
    **dict.fromkeys(("num_visual", "num_patches", "num_tiles"), "--max-visual-tokens"),
    "num_kept_total": "--max-context",
}


class Log(trt.ILogger):
    """Keeps the latest warnings and errors for the message of the next BackendError."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lines: deque[str] = deque(maxlen=_MESSAGES_KEPT)
        self._lock = threading.Lock()  # TensorRT logs from threads of its own

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity.name in _SERIOUS:
            with self._lock:
                self._lines.append(msg.strip())

    def take(self) -> str:
        """The messages since the last call, and forget them."""
        with self._lock:
            text = "; ".join(self._lines)
            self._lines.clear()
        return text or "TensorRT gave no reason"


def load_plugin(library: Path) -> bool:
    """Whether TensorRT has the plugin now. A process registers it once, whichever folder the library came from."""
    registry = trt.get_plugin_registry()
    return registry.get_creator(*_PLUGIN) is not None or registry.load_library(str(library)) is not None


def load_plans(engines: EngineFolder) -> dict[str, "Engine"]:
    """Deserialise all plans of a folder, the plugin first; needs a GPU. BackendError where one is refused."""
    log, rebuild = Log(), engines.manifest.rebuild
    runtime = trt.Runtime(log)  # without a GPU its destructor crashes
    if engines.plugin is not None and not load_plugin(engines.plugin):
        raise BackendError(f"{engines.plugin}: TensorRT cannot load the plugin: {log.take()}. Rebuild: make plugin")
    plans = {}
    for entry in engines.manifest.plans:
        path = engines.folder / entry.file
        log.take()  # what was said before is not the reason for what comes
        # memory-mapped, since reading it would double it in memory
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = log.take()
            raise BackendError(f"{path}: TensorRT {trt.__version__} cannot load it: {reason}. Rebuild: {rebuild}")
        plans[entry.stage] = Engine(runtime, engine, log, entry, rebuild)
    return plans


class Engine:
    """One plan, deserialised. Its weights are on the GPU once, whatever the number of contexts.

    log, rebuild: what TensorRT says, and the command that makes the plan anew, for errors.  scratch_bytes: device
    memory that a context needs while it runs.
    """

    def __init__(self, runtime: trt.Runtime, engine: trt.ICudaEngine, log: Log, entry: PlanEntry, rebuild: str) -> None:
        self.entry, self.rebuild, self.log = entry, rebuild, log
        self._runtime: trt.Runtime | None = runtime  # must outlive its engines
        self.loaded: trt.ICudaEngine | None = engine
        self._check_interface(engine)
        self.scratch_bytes = int(engine.device_memory_size_v2)

    def refused(self, what: str) -> BackendError:
        """The error of a call that TensorRT answered with False or None."""
        return BackendError(f"{self.entry.file}: TensorRT refused {what}: {self.log.take()}")

    def close(self) -> None:
        """Release it; its contexts must be gone."""
        self.loaded = self._runtime = None

    def _check_interface(self, engine: trt.ICudaEngine) -> None:
        """Compare the plan's tensors with what engines.json says."""
        got = {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            dtype = engine.get_tensor_dtype(name).name
            got[name] = (_FLOATS.get(dtype, dtype.lower()), engine.get_tensor_mode(name).name)
        expected = {entry.name: (entry.dtype, "INPUT") for entry in self.entry.inputs}
        expected |= {entry.name: (entry.dtype, "OUTPUT") for entry in self.entry.outputs}
        if got != expected:
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            shown = ", ".join(f"{name} (got {got.get(name)}, expected {expected.get(name)})" for name in wrong[:4])
            raise BackendError(
                f"{self.entry.file}: its tensors are not those of engines.json: {shown}. Rebuild: {self.rebuild}"
            )
        if engine.num_optimization_profiles != len(self.entry.profiles):
            raise BackendError(
                f"{self.entry.file}: got {engine.num_optimization_profiles} optimization profiles, "
                f"expected {len(self.entry.profiles)}. Rebuild: {self.rebuild}"
            )


class Context:
    """An execution context of one optimization profile, by its index.

    scratch: address of the engine's scratch_bytes, shared by all contexts, since no two ever run at once. Raises
    BackendError: TensorRT refused.
    """

    def __init__(self, engine: Engine, profile: int, scratch: int, stream: int) -> None:
        assert engine.loaded is not None
        context = engine.loaded.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise engine.refused("an execution context")
        if not context.set_optimization_profile_async(profile, stream):
            raise engine.refused(f"optimization profile {profile}")
        context.set_device_memory(scratch, engine.scratch_bytes)
        self._context: trt.IExecutionContext | None = context
        self._engine, self._stream = engine, stream
        self._ranges = {limits.name: limits for limits in engine.entry.profiles[profile]}

    def bind(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Set the shapes of all inputs and the addresses of all tensors; returns the shape of each output by name.

        dims: size of each dynamic dimension of an input, by the words of the stage contract, and of an output where it
        is known. Raises BackendError: a size that the plan was not built for, or TensorRT refused.
        """
        context = self._context
        assert context is not None
        self._engine.log.take()  # what was said before is not the reason for what comes
        plan = self._engine.entry
        for entry in plan.inputs:
            shape = resolve(entry, dims)
            self._check_range(entry, shape)
            if not context.set_input_shape(entry.name, shape):
                raise self._engine.refused(f"shape {list(shape)} of {entry.name}")
        for entry in (*plan.inputs, *plan.outputs):
            address = addresses[entry.name]
            assert address and address % ALIGNMENT == 0, f"{entry.name}: address {address:#x}"
            if not context.set_tensor_address(entry.name, address):
                raise self._engine.refused(f"address of {entry.name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._engine.refused(f"shapes ({error})") from error
        if missing:
            raise self._engine.refused(f"shapes: {', '.join(missing)} not specified")
        shapes = {entry.name: tuple(context.get_tensor_shape(entry.name)[:]) for entry in plan.outputs}
        for entry in plan.outputs:
            expected = tuple(dims.get(size, size) if isinstance(size, str) else size for size in entry.shape)
            got = shapes[entry.name]
            # -1 is a size that depends on data, and then its memory could not be planned
            if len(got) != len(expected) or any(
                size < 0 or (isinstance(wanted, int) and size != wanted)
                for size, wanted in zip(got, expected, strict=True)
            ):
                raise self._engine.refused(f"{entry.name}: got shape {list(got)}, expected {list(expected)}")
        return shapes

    def most(self, shapes: Mapping[str, tuple[int, ...]], word: str) -> int:
        """The largest size of a dimension that fits with all others as given by input name; 0 where they do not fit."""
        most = []
        for entry in self._engine.entry.inputs:
            limits = self._ranges[entry.name]
            for size, given, low, high in zip(entry.shape, shapes[entry.name], limits.min, limits.max, strict=True):
                if size == word:
                    most.append(high)
                elif not low <= given <= high:
                    return 0
        return min(most, default=0)

    def enqueue(self) -> None:
        """Enqueue one run with what was bound. Raises BackendError: TensorRT refused."""
        assert self._context is not None
        if not self._context.execute_async_v3(self._stream):
            raise self._engine.refused("enqueue")

    def close(self) -> None:
        self._context = None

    def _check_range(self, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        limits = self._ranges[entry.name]
        for word, size, low, high in zip(entry.shape, shape, limits.min, limits.max, strict=True):
            if not low <= size <= high:
                flag = _FLAGS.get(str(word))
                wider = f", with a larger {flag}" if flag and size > high else ""
                raise BackendError(
                    f"{entry.name}: got {word} = {size}, {self._engine.entry.file} was built for {low} to {high}. "
                    f"Rebuild{wider}: {self._engine.rebuild}"
                )


def resolve(entry: TensorEntry, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor, its words replaced by sizes."""
    return tuple(dims[size] if isinstance(size, str) else size for size in entry.shape)
