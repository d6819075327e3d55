"""A machine with a GPU and TensorRT, both stand-ins, and engine folders for it."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest

from cuda_standin import Driver
from engines.build_plan import BuildSettings, plan_build
from engines.profiles import LargestRequest
from engines.writer import write_engines
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import Machine
from tensorrt_standin import TensorRt, build

_OURS = ("hawk_trt.runtime.tensorrt.cuda", "hawk_trt.runtime.tensorrt")


def machine(version="10.16.1.11"):
    return Machine(tensorrt=version, cuda="13.0", driver=None, gpu="Stand-in", compute_capability="9.0")


def engine_folder(bundle_path, out, target, *, plugin=None, version="10.16.1.11", **limits):
    """Engines of a bundle, written by the project's own writer; the plans are the stand-in's."""
    bundle = Bundle.load(bundle_path)
    sizes = {"max_visual_tokens": 256, "max_prompt_tokens": 320, "max_context": 320, "batch": 4} | limits
    plan = plan_build(
        bundle,
        machine(version),
        target,
        LargestRequest(**sizes).limits(bundle.manifest, plugin=False),
        BuildSettings(None, None, None, ()),
        "python -m engines BUNDLE --out ENGINES",
    )
    plan = replace(plan, plugin=plugin)

    def build_stage(graph, entry):
        return build(graph, entry, version, plugin_layers=int(plugin is not None and entry.stage == "first_layer"))

    write_engines(plan, out, build_stage, None, lambda _: None)
    return out


class Machines:
    """Puts stand-ins in place of cuda.bindings and tensorrt, and takes them away again."""

    def __init__(self):
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        self.driver = Driver()
        self.trt = TensorRt(self.driver)
        bindings = ModuleType("cuda.bindings")
        bindings.driver = self.driver
        package = ModuleType("cuda")
        package.bindings = bindings
        stand_ins = {
            "tensorrt": self.trt,
            "cuda": package,
            "cuda.bindings": bindings,
            "cuda.bindings.driver": self.driver,
        }
        for name, module in stand_ins.items():
            self.patch.setitem(sys.modules, name, module)
        _forget()
        return self

    def __exit__(self, *_):
        self.patch.undo()
        _forget()


def _forget():
    """Drop the modules that hold the stand-ins, or would."""
    for name in [name for name in sys.modules if name.startswith(_OURS)]:
        parent, _, child = name.rpartition(".")
        del sys.modules[name]
        if hasattr(sys.modules.get(parent), child):
            delattr(sys.modules[parent], child)
