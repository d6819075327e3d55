"""`hawk-trt doctor`: what works on this machine, the command that adds what is missing, and whether a bundle is whole.

Nothing heavy is imported: versions come from package metadata. Only ONNX Runtime is loaded, since whether
its CUDA provider works shows when it runs a graph and not before.
"""

import importlib
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import hawk_trt
from hawk_trt.apps.cli.extras import extras
from hawk_trt.apps.cli.models import expect_exported, manifest_of, verify
from hawk_trt.apps.cli.options import Json
from hawk_trt.apps.cli.output import note, print_json, size
from hawk_trt.bundle import Manifest
from hawk_trt.errors import BundleError
from hawk_trt.runtime.versions import at_least, available_memory_bytes

# The extras that commands need.
EXTRAS = ("export", "serve", "video", "eval", "parity")
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
TENSORRTS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
CUDA_BINDINGS = "cuda-bindings"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
_NO_GPU = "no NVIDIA GPU with a driver here (nvidia-smi lists none)"

# y = x + x of one float32, opset 18: the least that shows a provider computing.
_ADD_ONNX = (
    b'\x08\n:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi tells it; memory in MiB, None where the GPU shares the machine's."""

    name: str
    compute_capability: str
    driver: str
    memory_total_mib: int | None
    memory_free_mib: int | None


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing a user may want to do."""

    name: str
    works: bool
    detail: str  # with what it works, or why it does not
    command: str | None = None  # what adds it; None where it works or nothing that can be installed would help


@dataclass(frozen=True, slots=True)
class Report:
    """All that doctor finds out about the machine."""

    packages: dict[str, str | None]  # versions by name, None where not installed
    providers: tuple[str, ...]  # ONNX Runtime's execution providers, as it lists them
    gpus: tuple[Gpu, ...]
    capabilities: tuple[Capability, ...]
    tested: dict[str, str] = field(default_factory=lambda: tested_versions())  # versions that the tests pass with
    hawk_trt: str = hawk_trt.__version__
    python: str = platform.python_version()
    machine: str = f"{platform.system()} {platform.machine()}"
    memory_available_bytes: int | None = field(default_factory=available_memory_bytes)  # None: the system does not say
    disk_free_bytes: int = field(default_factory=lambda: shutil.disk_usage(Path.cwd()).free)  # in the current folder


def examine() -> Report:
    """Look at the machine."""
    needed = extras()
    named = [name for extra in ("", *EXTRAS) for name in needed.get(extra, ())]
    packages = {name: installed_version(name) for name in (*named, *ONNX_RUNTIMES, *TENSORRTS, CUDA_BINDINGS)}
    gpus = find_gpus()
    providers, problem = _providers()
    onnxruntime = next(
        (found for name in reversed(ONNX_RUNTIMES) if (found := packages[name])), "of an unknown version"
    )
    capabilities = (
        _cpu(onnxruntime, problem),
        _cuda(onnxruntime, packages, providers, gpus, problem),
        *(_extra(name, needed.get(name, {}), packages) for name in EXTRAS),
        _tensorrt(packages, gpus),
    )
    return Report(packages, providers, gpus, capabilities)


def installed_version(name: str) -> str | None:
    """Version of a package by its metadata, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tested_versions() -> dict[str, str]:
    """The versions that the tests pass with, by package."""
    pins = (Path(hawk_trt.__file__).parent / "data" / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\w.+]+)", pins, re.MULTILINE))


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where there is no nvidia-smi or no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = "name,compute_cap,driver_version,memory.total,memory.free"
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return parse_gpus(subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout)
    except (subprocess.SubprocessError, OSError):
        return ()


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """The lines of nvidia-smi's name, compute_cap, driver_version, memory.total, memory.free as csv."""
    gpus = []
    for line in listing.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 4)]
        if len(fields) == 5:
            name, capability, driver, *memory = fields
            total, free = (int(field) if field.isdigit() else None for field in memory)  # "[N/A]" on a Jetson
            gpus.append(Gpu(name, capability, driver, total, free))
    return tuple(gpus)


def provider_problem(provider: str) -> str | None:
    """Run a graph of one node on an execution provider of ONNX Runtime: None if it computes there, else why not."""
    onnxruntime = importlib.import_module("onnxruntime")
    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {provider}"
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    errors: tuple[type[Exception], ...] = (*own, RuntimeError, ValueError, ImportError)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the reason is in what is raised
    try:
        session = onnxruntime.InferenceSession(_ADD_ONNX, options, providers=[provider], enable_fallback=0)
        if provider not in session.get_providers():
            return "its libraries cannot be loaded"
        (y,) = session.run(None, {"x": np.ones(1, np.float32)})
    except errors as error:
        return " ".join(str(error).split())[:200]
    return None if y.tolist() == [2.0] else f"1 + 1 gives {y.tolist()} there"


def _providers() -> tuple[tuple[str, ...], str | None]:
    """The listed execution providers, and why ONNX Runtime cannot be used at all."""
    if find_spec("onnxruntime") is None:
        return (), "onnxruntime is not installed"
    try:
        return tuple(importlib.import_module("onnxruntime").get_available_providers()), None
    except ImportError as error:
        return (), f"onnxruntime cannot be imported ({error})"


def _cpu(onnxruntime: str, problem: str | None) -> Capability:
    problem = problem or provider_problem(CPU_PROVIDER)
    if problem:
        return Capability("run on CPU", False, problem, "pip install 'hawk-trt[cpu]'")
    return Capability("run on CPU", True, f"onnxruntime {onnxruntime}; float32 and float16 bundles")


def _cuda(
    onnxruntime: str,
    packages: dict[str, str | None],
    providers: tuple[str, ...],
    gpus: tuple[Gpu, ...],
    problem: str | None,
) -> Capability:
    name = "run on CUDA"
    if not gpus and CUDA_PROVIDER not in providers:
        return Capability(name, False, _NO_GPU)
    if problem or CUDA_PROVIDER not in providers:
        # The two packages share one folder: with both installed, either may win.
        remove = "pip uninstall -y onnxruntime onnxruntime-gpu && " if packages["onnxruntime"] else ""
        detail = problem or f"this onnxruntime has no {CUDA_PROVIDER}"
        return Capability(name, False, detail, f"{remove}pip install 'hawk-trt[cuda]'")
    problem = provider_problem(CUDA_PROVIDER)
    if problem:
        return Capability(name, False, f"{CUDA_PROVIDER}: {problem}", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return Capability(name, True, f"onnxruntime {onnxruntime} on {gpus[0].name if gpus else 'CUDA device'}")


def _extra(name: str, needed: dict[str, str], packages: dict[str, str | None]) -> Capability:
    if not needed:
        return Capability(name, False, "hawk-trt itself is not installed", "pip install -e .")
    lacking = []
    for package, lowest in needed.items():
        found = packages[package]
        if found is None:
            lacking.append(f"{package} is not installed")
        elif not at_least(found, lowest):
            lacking.append(f"{package} {found} is older than {lowest}")
    if lacking:
        return Capability(name, False, ", ".join(lacking), f"pip install 'hawk-trt[{name}]'")
    return Capability(name, True, ", ".join(f"{package} {packages[package]}" for package in needed))


def _tensorrt(packages: dict[str, str | None], gpus: tuple[Gpu, ...]) -> Capability:
    found = next((packages[name] for name in TENSORRTS if packages[name]), None)
    if found is None and find_spec("tensorrt") is not None:
        found = "of an unknown version"
    if not gpus:
        return Capability("TensorRT", False, _NO_GPU)
    if found is None:
        return Capability("TensorRT", False, "tensorrt is not installed", "pip install 'tensorrt>=10.3'")
    if packages[CUDA_BINDINGS] is None:
        return Capability("TensorRT", False, f"{CUDA_BINDINGS} is not installed", "pip install 'hawk-trt[tensorrt]'")
    return Capability("TensorRT", True, f"tensorrt {found} on {gpus[0].name}")


def doctor(model: Path | None = None, *, json: Json = False) -> int:
    """Say what works on this machine, and what would add the rest.

    Example: hawk-trt doctor artifacts/3b

    Args:
        model: a bundle or engines to check too, every file by hash
        json: print all findings as JSON

    Returns:
        0, or 1 where nothing can be run at all or the bundle is damaged.
    """
    if model is not None:
        expect_exported(model)
    report = examine()
    manifest, problem = None, None
    if model is not None:
        try:
            manifest = manifest_of(model)
            verify(model)
        except BundleError as error:
            problem = str(error)
    if json:
        bundle = {"folder": str(model), "manifest": manifest, "problem": problem}
        print_json(report, {} if model is None else {"bundle": bundle})
    else:
        _print_machine(report)
        if model is not None:
            print(f"\n{model}: {'not usable' if problem else 'whole, every file as exported'}")
        if manifest is not None:
            _print_manifest(manifest)
    if problem is not None:
        note(f"error: {problem}")
        return 1
    runs = any(one.works for one in report.capabilities if one.name in ("run on CPU", "run on CUDA"))
    return 0 if runs else 1


def _print_machine(report: Report) -> None:
    print(f"hawk-trt {report.hawk_trt}, Python {report.python}, {report.machine}")
    for gpu in report.gpus:
        memory = "" if gpu.memory_free_mib is None else f", {gpu.memory_free_mib} of {gpu.memory_total_mib} MiB free"
        print(f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}{memory}")
    memory = "unknown" if report.memory_available_bytes is None else size(report.memory_available_bytes)
    print(f"memory available {memory}, disk free {size(report.disk_free_bytes)}")
    installed = [
        f"{name} {found}" + ("" if report.tested.get(name, found) == found else f" (tested with {report.tested[name]})")
        for name, found in report.packages.items()
        if found
    ]
    print(f"packages: {', '.join(installed)}")
    print(f"onnxruntime providers: {', '.join(report.providers) or 'none'}\n")
    width = max(len(capability.name) for capability in report.capabilities)
    for capability in report.capabilities:
        state = "works" if capability.works else "missing"
        print(f"{state:<7}  {capability.name:<{width}}  {capability.detail}")
        if capability.command is not None:
            print(f"{'':<7}  {'':<{width}}  {capability.command}")


def _print_manifest(manifest: Manifest) -> None:
    language = manifest.language
    linear = f", {language.num_linear_layers} of them linear attention" if language.num_linear_layers else ""
    total_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    lines = {
        "model": f"{manifest.source.name} ({manifest.source.architecture})",
        "graphs": f"{manifest.precision}, targets {', '.join(manifest.targets)}, "
        f"normalization {manifest.normalization}",
        "sizes": f"{language.num_hidden_layers} layers{linear}, hidden size {language.hidden_size}, "
        f"{language.num_attention_heads} query and {language.num_key_value_heads} key-value heads, "
        f"up to {language.max_position_embeddings} positions",
        "pruning": f"keep ratio {manifest.keep_ratio:g}, head weights: {manifest.head_weights.source}",
        "files": f"{len(manifest.files)}, {size(total_bytes)}{', weights linked' if manifest.source.linked else ''}",
        "made with": ", ".join(f"{name} {found}" for name, found in manifest.versions.items()),
    }
    for name, line in lines.items():
        print(f"  {name:<9}  {line}")
    if manifest.dtype == "bfloat16":
        print(f"  {'note':<9}  ONNX Runtime's CPU cannot run bfloat16: --device cuda, or export with --dtype float32")
