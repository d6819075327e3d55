"""A stand-in for the tensorrt module: a plan holds the graph as it would be built, and a context runs it with ONNX
Runtime on the very addresses it was given. What TensorRT refuses is refused, with a line in its logger.
"""

# ruff: noqa: ARG002, N802 - the names and arguments are TensorRT's
import json
import struct
from types import ModuleType, SimpleNamespace
from weakref import WeakSet

import numpy as np
import onnx
import onnxruntime as ort
from xxhash import xxh3_128_digest

import internvl
from cuda_standin import ALIGNMENT
from engines.build_plan import BuiltPlan
from hawk_trt.bundle import numpy_dtype

SCRATCH_BYTES = 4096
_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
_sessions = {}


def build(graph, entry, version="10.16.1.11", plugin_layers=0):
    """A plan of a prepared graph, for the stand-in's runtime."""
    model = onnx.load_model_from_string(graph.content)
    onnx.load_external_data_for_model(model, str(graph.file.parent))
    for node in model.graph.node:  # which ONNX Runtime refuses
        kept = [attribute for attribute in node.attribute if attribute.name != "TRT_decomposable"]
        del node.attribute[:]
        node.attribute.extend(kept)
    told = {
        "stage": entry.stage,
        "inputs": [(t.name, t.dtype, t.shape) for t in entry.inputs],
        "outputs": [(t.name, t.dtype, t.shape) for t in entry.outputs],
        "profiles": [[(r.name, r.min, r.max) for r in profile] for profile in entry.profiles],
        "plugin_layers": plugin_layers,
    }
    header = json.dumps(told).encode()
    start = b"ftrt".ljust(24, b"\0") + bytes(int(part) for part in version.split("."))
    content = start + struct.pack("<q", len(header)) + header + model.SerializeToString()
    return BuiltPlan(memoryview(content), len(model.graph.node), plugin_layers, (), 0, 0.0)


class Refused(Exception):
    """What TensorRT logs as an error and answers with False."""


class ILogger:
    class Severity:
        ERROR = SimpleNamespace(name="ERROR")

    def log(self, severity, msg):
        raise NotImplementedError


class TensorRt(ModuleType):
    """The module, over a cuda stand-in.

    Attributes:
        enqueues: runs by stage and profile.
        calls: of contexts, by method.
    """

    def __init__(self, driver, version="10.16.1.11"):
        super().__init__("tensorrt")
        self.driver = driver
        self.__version__ = version
        self.ILogger, self.ICudaEngine, self.IExecutionContext = ILogger, Engine, Context
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user", STATIC="static")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.objects = WeakSet()
        self.creators, self.libraries = {}, []
        self.enqueues, self.calls = [], []
        self.uncapturable = False
        self.scratch_bytes = SCRATCH_BYTES

    def Runtime(self, log):
        return Runtime(self, log)

    def get_plugin_registry(self):
        return self

    def get_creator(self, name, version, namespace):
        return self.creators.get((name, version, namespace))

    def load_library(self, path):
        if self.creators:
            return None  # TensorRT refuses what is registered already
        self.libraries.append(path)
        self.creators["WeightedTopK", "1", ""] = path
        return object()


class Owned:
    """What must be gone before the GPU's context is given back."""

    def __init__(self, module, log):
        self.module, self.log = module, log
        self.driver = module.driver
        module.objects.add(self)
        if not self.driver.current:
            self.driver.faults.append(f"{type(self).__name__} made without a context")

    def __del__(self):
        if not self.driver.retained:
            self.driver.faults.append(f"{type(self).__name__} outlived the context")

    def refuse(self, message):
        self.log.log(ILogger.Severity.ERROR, message)
        return False


class Runtime(Owned):
    def deserialize_cuda_engine(self, plan):
        content = memoryview(plan)
        if content[:4] != b"ftrt":
            return self.refuse("not a plan") or None
        (length,) = struct.unpack_from("<q", content, 28)
        told = json.loads(bytes(content[36 : 36 + length]))
        if told["plugin_layers"] and not self.module.creators:
            return self.refuse("plugin WeightedTopK not found in the registry") or None
        return Engine(self, told, content[36 + length :])


class Engine(Owned):
    def __init__(self, runtime, told, model):
        super().__init__(runtime.module, runtime.log)
        self.runtime, self.told = runtime, told
        self.tensors = {name: (dtype, tuple(shape)) for name, dtype, shape in told["inputs"] + told["outputs"]}
        self.inputs = [name for name, _, _ in told["inputs"]]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(told["profiles"])
        self.device_memory_size_v2 = self.module.scratch_bytes
        digest = xxh3_128_digest(model)
        if digest not in _sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            model = bytes(model)
            _sessions[digest] = model, ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.model, self.session = _sessions[digest]

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=_TYPES[self.tensors[name][0]])

    def get_tensor_mode(self, name):
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, layout):
        """A kernel of its own for each node, as where nothing is fused."""
        assert layout == "json"
        nodes = onnx.load_model_from_string(self.model).graph.node
        layers = [{"Name": node.name, "Metadata": f"[ONNX Layer: {node.name}]", "TacticName": ""} for node in nodes]
        return json.dumps({"Layers": layers, "Bindings": list(self.tensors)})

    def create_execution_context(self, strategy):
        assert strategy == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context(Owned):
    def __init__(self, engine):
        super().__init__(engine.module, engine.log)
        self.engine = engine
        self.profile, self.scratch = None, None
        self.shapes, self.addresses, self.settled = {}, {}, None

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        ranges = self.engine.told["profiles"]
        return profile < len(ranges) or self.refuse(f"no optimization profile {profile}")

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def set_input_shape(self, name, shape):
        self.module.calls.append("set_input_shape")
        low, high = next((low, high) for n, low, high in self.engine.told["profiles"][self.profile] if n == name)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self.refuse(f"setInputShape: {name} {shape} is outside of profile {self.profile}, {low} to {high}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.module.calls.append("set_tensor_address")
        if name not in self.engine.tensors:
            return self.refuse(f"setTensorAddress: no tensor {name}")
        if address % ALIGNMENT:
            return self.refuse(f"setTensorAddress: {name}: {address:#x} is not aligned to {ALIGNMENT} bytes")
        self.addresses[name] = address
        return True

    def infer_shapes(self):
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name):
        words = {
            word: size
            for source, shape in self.shapes.items()
            for word, size in zip(self.engine.tensors[source][1], shape, strict=True)
        }
        if "num_tiles" in words:
            words["num_visual"] = words["num_tiles"] * internvl.TILE_TOKENS
        elif self.engine.told["stage"] == "vision":
            words["num_visual"] = words["num_frames"] * words["num_patches"] // 4  # 2 x 2 patches a token
        return tuple(size if isinstance(size, int) else words.get(size, -1) for size in self.engine.tensors[name][1])

    def execute_async_v3(self, stream):
        try:
            tensors = self._ready(stream)
        except Refused as error:
            self.driver.invalid = self.driver.captured is not None
            return self.refuse(str(error))
        self.settled = dict(self.shapes)
        label = (self.engine.told["stage"], self.profile)
        self.driver.put(f"{label[0]} {label[1]}", lambda: self._run(tensors, label))
        return True

    def _ready(self, stream):
        """Name, dtype, shape and address of every tensor; or what is missing."""
        driver = self.driver
        if stream not in driver.handles:
            raise Refused("enqueueV3: no such stream")
        if self.scratch is None or self.scratch[1] < self.module.scratch_bytes or driver.block(*self.scratch) is None:
            raise Refused("enqueueV3: device memory is not set, too small or freed")
        if driver.captured is not None and (self.settled != self.shapes or self.module.uncapturable):
            raise Refused("enqueueV3: shapes changed since the last enqueue, which cannot be captured")
        tensors = []
        for name, (dtype, _) in self.engine.tensors.items():
            if name not in self.addresses:
                raise Refused(f"enqueueV3: address is not set for tensor {name}")
            shape = self.shapes[name] if name in self.engine.inputs else self.get_tensor_shape(name)
            if -1 in shape:
                raise Refused(f"enqueueV3: {name} has no shape")
            size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
            if driver.block(self.addresses[name], size) is None:
                raise Refused(f"enqueueV3: {name}: {size} bytes at its address are not device memory")
            if self.scratch[0] < self.addresses[name] + size and self.addresses[name] < sum(self.scratch) and size:
                raise Refused(f"enqueueV3: {name} lies in the scratch memory")
            tensors.append((name, dtype, shape, self.addresses[name]))
        self._check_aliases({name: (address, shape) for name, _, shape, address in tensors})
        return tensors

    def _check_aliases(self, places):
        """A static cache of keys or values is input and output at one address; nothing else may be."""
        outputs = [name for name in places if name not in self.engine.inputs]
        for output in outputs:
            shared = [name for name in self.engine.inputs if places[name][0] == places[output][0]]
            past = output.replace("present_", "past_")
            static = output.startswith(("present_key", "present_value")) and places[past][1] == places[output][1]
            if shared != ([past] if static else []):
                raise Refused(f"enqueueV3: {output} shares its address with {shared}")

    def _run(self, tensors, label):
        """What the GPU does: also overwrite the scratch memory."""
        driver = self.driver
        for _, dtype, shape, address in tensors:
            if driver.block(address, int(np.prod(shape)) * numpy_dtype(dtype).itemsize) is None:
                return False
        driver.block(*self.scratch).view(*self.scratch)[:] = 0xFF
        binding = self.engine.session.io_binding()
        for name, dtype, shape, address in tensors:
            kind = numpy_dtype(dtype)
            if name in self.engine.inputs:
                binding.bind_input(name, "cpu", 0, kind, shape, address)
            else:
                binding.bind_output(name, "cpu", 0, kind, shape, address)
        self.engine.session.run_with_iobinding(binding)
        self.module.enqueues.append(label)
        return True
