"""What an engine build will do, all of it known before TensorRT is asked for anything, and whether it is needed.

In: a bundle, the machine, limits and options. Out: prepared graphs, and engines.json as it will be but for what only
the builds tell; or, of a folder that is there, in what it differs from that.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from hawk_trt import __version__
from hawk_trt.bundle import MANIFEST, Bundle, Manifest, numpy_dtype
from hawk_trt.engine_folder import (
    ALIGNMENT,
    ENGINES_SCHEMA_VERSION,
    EngineFolder,
    EngineManifest,
    Limits,
    Machine,
    PlanEntry,
)
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.files import xxh3_file
from hawk_trt.runtime.versions import at_least
from hawk_trt.stages import PORTABLE, STAGES

from .prepare import PreparedGraph, prepare
from .profiles import plan_profiles
from .workarounds import Workaround

_FLOAT8_CAPABILITY = "8.9"
# The code that decides what a plan is: another version of it makes plans stale.
_DECIDES = ("builder.py", "prepare.py", "profiles.py", "workarounds.py")


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What all stages of one run share."""

    plugin: Path | None  # the top-k plugin's library, None to build without
    workspace_bytes: int | None  # scratch that a tactic may take, None for all there is
    timing_cache: Path | None  # keeps measured tactics between builds
    workarounds: tuple[Workaround, ...]
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What is to be built; `manifest` is engines.json as it will be, but for what only the builds tell."""

    bundle: Bundle
    manifest: EngineManifest
    graphs: tuple[PreparedGraph, ...]
    plugin: Path | None


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """One built plan, and what engines.json tells of it."""

    content: memoryview  # the serialized engine, in TensorRT's own memory: a copy would double it
    layers: int  # of the network after parsing
    plugin_layers: int  # of these, the top-k plugin's
    flags: tuple[str, ...]  # of the builder, those that were on
    scratch_bytes: int  # device memory that it needs while it runs, by TensorRT's log; 0 where that says nothing
    seconds: float  # of parsing and building


def plan_build(
    bundle: Bundle, machine: Machine, target: str, limits: Limits, settings: BuildSettings, rebuild: str
) -> BuildPlan:
    """Prepare all graphs and lay out their profiles; rebuild: the command that does this.

    Raises:
        HawkError: the bundle lacks the target, its family has no engines, or this GPU lacks the type of its weights.
    """
    plugin = settings.plugin
    graphs = tuple(
        prepare(bundle, stage, target, max_context=limits.context, plugin=plugin is not None, tensorrt=machine.tensorrt)
        for stage in STAGES
    )
    if any(graph.has_float8 for graph in graphs) and not at_least(machine.compute_capability, _FLOAT8_CAPABILITY):
        first = "" if PORTABLE in bundle.manifest.targets else "export again with --target portable and "
        raise InvalidInput(
            f"weights: got FP8, which begins with compute capability {_FLOAT8_CAPABILITY}; {machine.gpu} has "
            f"{machine.compute_capability}. Target portable holds the same weights in {bundle.manifest.dtype}: "
            f"{first}build with --target portable. Smaller: export a checkpoint of int4 weights (AWQ, GPTQ)"
        )
    _check_alignment(bundle.manifest, limits.context)
    plans = tuple(
        PlanEntry(
            stage=graph.stage,
            file=f"{graph.stage}.plan",
            onnx_xxh3=graph.xxh3,
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=plan_profiles(bundle.manifest, graph.stage, graph.inputs, limits),
            plugin_layers=0,
            layers=0,
            flags=(),
            workarounds=tuple(entry.name for entry in settings.workarounds),
            seconds=0.0,
        )
        for graph in graphs
    )
    digest = hashlib.sha256()
    for name in _DECIDES:
        digest.update(name.encode() + (Path(__file__).parent / name).read_bytes())
    manifest = EngineManifest(
        schema_version=ENGINES_SCHEMA_VERSION,
        bundle=replace(bundle.manifest, graphs=(), targets=(target,), files={}),
        bundle_xxh3=xxh3_file(bundle.folder / MANIFEST),
        target=target,
        limits=limits,
        machine=machine,
        plans=plans,
        plugin=None if plugin is None else plugin.name,
        plugin_xxh3=None if plugin is None else xxh3_file(plugin),
        workspace_bytes=settings.workspace_bytes,
        files={},
        rebuild=rebuild,
        versions={"hawk_trt": __version__, "engines": digest.hexdigest()[:16], "onnx": metadata.version("onnx")},
    )
    return BuildPlan(bundle, manifest, graphs, plugin)


def _check_alignment(manifest: Manifest, context: int) -> None:
    """Refuse sizes whose rows TensorRT could not bind: it takes addresses at multiples of 256 bytes alone."""
    language, itemsize = manifest.language, numpy_dtype(manifest.dtype).itemsize
    if language.hidden_size * itemsize % ALIGNMENT:
        raise InvalidInput(
            f"hidden_size: got {language.hidden_size} in {manifest.dtype}, expected rows of a multiple of {ALIGNMENT} "
            "bytes. This version cannot build engines for this model"
        )
    columns = ALIGNMENT // math.gcd(ALIGNMENT, language.num_key_value_heads * language.head_dim * itemsize)
    if context % columns:
        raise InvalidInput(f"--max-context: got {context}, expected a multiple of {columns} with this model")


def differences(plan: BuildPlan, out: Path) -> list[str] | None:
    """What an engine folder that is there differs in from what would be built; None where none is there to compare."""
    try:
        built = EngineFolder.load(out).manifest
    except BundleError:
        return None
    wanted, found = _key(plan.manifest), _key(built)
    return [name for name in wanted if wanted[name] != found[name]]


def _key(manifest: EngineManifest) -> dict[str, object]:
    """All that makes plans another build's, by the word for it."""
    return {
        "bundle": manifest.bundle_xxh3,
        "graphs": [plan.onnx_xxh3 for plan in manifest.plans],
        "target": manifest.target,
        "limits": (manifest.limits, [plan.profiles for plan in manifest.plans]),
        "TensorRT": manifest.machine.tensorrt,
        "CUDA": manifest.machine.cuda,
        "driver": manifest.machine.driver,
        "GPU": (manifest.machine.gpu, manifest.machine.compute_capability),
        "plugin": manifest.plugin_xxh3,
        "workspace": manifest.workspace_bytes,
        "workarounds": [plan.workarounds for plan in manifest.plans],
        "engine builder": manifest.versions,
    }
