"""`hawk-trt doctor`: what works on this machine, and whether a bundle is whole."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hawk_trt.apps.cli.doctor_checks import EXTRAS, Report, examine
from hawk_trt.apps.cli.models import expect_exported, manifest_of, verify
from hawk_trt.apps.cli.options import Json
from hawk_trt.apps.cli.output import note, print_json, size
from hawk_trt.bundle import Manifest
from hawk_trt.errors import BackendError, BundleError

NEEDS = ("cpu", "cuda", "tensorrt", *EXTRAS)


def doctor(
    model: Path | None = None,
    *,
    need: Annotated[tuple[str, ...], Parameter(choices=NEEDS)] = (),
    json: Json = False,
) -> int:
    """Say what works on this machine, and what would add the rest.

    Example: hawk-trt doctor artifacts/3b

    Args:
        model: a bundle or engines to check too, every file by hash
        need: say nothing where this works, else what it lacks, in one line; repeatable
        json: print all findings as JSON

    Returns:
        0, or 1 where nothing can be run at all or the bundle is damaged.
    """
    if model is not None:
        expect_exported(model)
    report = examine()
    if need:
        for capability in report.capabilities:
            if capability.name.lower().removeprefix("run on ") in need and not capability.works:
                command = f": {capability.command}" if capability.command else ". All that works here: hawk-trt doctor"
                raise BackendError(f"{capability.name}: {capability.detail}{command}")
        return 0
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
    total_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    lines = {
        "model": f"{manifest.source.name} ({manifest.source.architecture})",
        "graphs": f"{manifest.precision}, targets {', '.join(manifest.targets)}, "
        f"normalization {manifest.normalization}",
        "sizes": f"{language.num_hidden_layers} layers, hidden size {language.hidden_size}, "
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
