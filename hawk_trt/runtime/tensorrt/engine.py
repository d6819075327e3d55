"""Plans and execution contexts: every bool, None and name that TensorRT returns is checked here.

A context is one optimization profile of one plan. It is told its shapes and addresses by `bind` and runs with
`enqueue`. Its scratch memory is given from outside, one for all contexts, since no two ever run at once.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path

import tensorrt as trt

from hawk_trt.bundle import TensorEntry
from hawk_trt.engine_folder import PlanEntry
from hawk_trt.errors import BackendError
from hawk_trt.runtime.tensorrt.log import Log

ALIGNMENT = 256
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
_PLUGIN = ("WeightedTopK", "1", "")  # name, version, namespace
# What to build with where a dimension is too large.
_FLAGS = {
    "batch": "--batch",
    "seq_len": "--max-prompt-tokens",
    "num_visual": "--max-visual-tokens",
    "num_kept_total": "--max-context",
}


class Runtime:
    """TensorRT's runtime and its log. Make none without a GPU: its destructor crashes there."""

    def __init__(self) -> None:
        self._log = Log()
        self._runtime: trt.Runtime | None = trt.Runtime(self._log)

    def load_plugin(self, library: Path) -> None:
        """Register the plugin. A process does so once, whichever folder the library came from.

        Raises:
            BackendError: TensorRT cannot load it.
        """
        registry = trt.get_plugin_registry()
        if registry.get_creator(*_PLUGIN) is None and registry.load_library(str(library)) is None:
            raise BackendError(f"{library}: TensorRT cannot load the plugin: {self._log.take()}. Rebuild: make plugin")

    def load(self, path: Path, entry: PlanEntry, rebuild: str) -> "Engine":
        """Deserialise a plan, memory-mapped: reading it would double it in memory.

        Args:
            path: the plan.
            entry: what engines.json says about it.
            rebuild: the command that makes it anew, for errors.

        Raises:
            BackendError: TensorRT cannot load it.
        """
        assert self._runtime is not None
        self._log.take()  # what was said before is not the reason for what comes
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            reason = self._log.take()
            raise BackendError(f"{path}: TensorRT {trt.__version__} cannot load it: {reason}. Rebuild: {rebuild}")
        return Engine(engine, self._log, entry, rebuild)

    def close(self) -> None:
        """Release it; its engines must be gone."""
        self._runtime = None


class Engine:
    """One plan, deserialised. Its weights are on the GPU once, whatever the number of contexts.

    Attributes:
        entry: what engines.json says about it.
        scratch_bytes: device memory that a context needs while it runs.
    """

    def __init__(self, engine: trt.ICudaEngine, log: Log, entry: PlanEntry, rebuild: str) -> None:
        self.entry = entry
        self._engine: trt.ICudaEngine | None = engine
        self._log = log
        self._rebuild = rebuild
        self._check_interface(engine)
        self.scratch_bytes = int(engine.device_memory_size_v2)

    def context(self, profile: int, scratch: int, stream: int) -> "Context":
        """An execution context for an optimization profile.

        Args:
            profile: its index.
            scratch: address of at least scratch_bytes.
            stream: handle of the stream that it will run on.

        Raises:
            BackendError: TensorRT refused.
        """
        assert self._engine is not None
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"{self.entry.file}: no execution context: {self._log.take()}")
        if not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"{self.entry.file}: optimization profile {profile}: {self._log.take()}")
        context.set_device_memory(scratch, self.scratch_bytes)
        return Context(context, self.entry, profile, stream, self._log, self._rebuild)

    def close(self) -> None:
        """Release it; its contexts must be gone."""
        self._engine = None

    def _check_interface(self, engine: trt.ICudaEngine) -> None:
        """Compare the plan's tensors with what engines.json says."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        got = {
            name: (_DTYPES.get(engine.get_tensor_dtype(name).name), engine.get_tensor_mode(name).name) for name in names
        }
        expected = {entry.name: (entry.dtype, "INPUT") for entry in self.entry.inputs}
        expected |= {entry.name: (entry.dtype, "OUTPUT") for entry in self.entry.outputs}
        if got != expected:
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            shown = ", ".join(f"{name} (got {got.get(name)}, expected {expected.get(name)})" for name in wrong[:4])
            raise BackendError(
                f"{self.entry.file}: its tensors are not those of engines.json: {shown}. Rebuild: {self._rebuild}"
            )
        if engine.num_optimization_profiles != len(self.entry.profiles):
            raise BackendError(
                f"{self.entry.file}: got {engine.num_optimization_profiles} optimization profiles, "
                f"expected {len(self.entry.profiles)}. Rebuild: {self._rebuild}"
            )


class Context:
    """An execution context of one optimization profile."""

    def __init__(
        self, context: trt.IExecutionContext, entry: PlanEntry, profile: int, stream: int, log: Log, rebuild: str
    ) -> None:
        self._context: trt.IExecutionContext | None = context
        self._entry = entry
        self._ranges = {limits.name: limits for limits in entry.profiles[profile]}
        self._stream = stream
        self._log = log
        self._rebuild = rebuild

    def bind(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Set the shapes of all inputs and the addresses of all tensors.

        Args:
            dims: size of each dynamic dimension of an input, by the words of the stage contract, and of an output
                where it is known.
            addresses: device address of each tensor by name.

        Returns:
            The shape of each output by name.

        Raises:
            BackendError: a size that the plan was not built for, or TensorRT refused.
        """
        context = self._context
        assert context is not None
        self._log.take()
        for entry in self._entry.inputs:
            shape = resolve(entry, dims)
            self._check_range(entry, shape)
            if not context.set_input_shape(entry.name, shape):
                raise self._refused(f"shape {list(shape)} of {entry.name}")
        for entry in (*self._entry.inputs, *self._entry.outputs):
            address = addresses[entry.name]
            assert address and address % ALIGNMENT == 0, f"{entry.name}: address {address:#x}"
            if not context.set_tensor_address(entry.name, address):
                raise self._refused(f"address of {entry.name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._refused(f"shapes ({error})") from error
        if missing:
            raise self._refused(f"shapes: {', '.join(missing)} not specified")
        shapes = {entry.name: tuple(context.get_tensor_shape(entry.name)[:]) for entry in self._entry.outputs}
        for entry in self._entry.outputs:
            expected = tuple(dims.get(size, size) if isinstance(size, str) else size for size in entry.shape)
            got = shapes[entry.name]
            # -1 is a size that depends on data, and then its memory could not be planned
            if len(got) != len(expected) or any(
                size < 0 or (isinstance(wanted, int) and size != wanted)
                for size, wanted in zip(got, expected, strict=True)
            ):
                raise self._refused(f"{entry.name}: got shape {list(got)}, expected {list(expected)}")
        return shapes

    def enqueue(self) -> None:
        """Enqueue one run with what was bound.

        Raises:
            BackendError: TensorRT refused.
        """
        assert self._context is not None
        if not self._context.execute_async_v3(self._stream):
            raise self._refused("enqueue")

    def close(self) -> None:
        """Release it."""
        self._context = None

    def _check_range(self, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        limits = self._ranges[entry.name]
        if limits.holds(shape):
            return
        for word, size, low, high in zip(entry.shape, shape, limits.min, limits.max, strict=True):
            if not low <= size <= high:
                flag = _FLAGS.get(str(word))
                wider = f", with a larger {flag}" if flag and size > high else ""
                raise BackendError(
                    f"{entry.name}: got {word} = {size}, {self._entry.file} was built for {low} to {high}. "
                    f"Rebuild{wider}: {self._rebuild}"
                )

    def _refused(self, what: str) -> BackendError:
        return BackendError(f"{self._entry.file}: TensorRT refused {what}: {self._log.take()}")


def resolve(entry: TensorEntry, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor, its words replaced by sizes."""
    return tuple(dims[size] if isinstance(size, str) else size for size in entry.shape)
