"""The command `hawk-trt build`, in a checkout also python -m engines: a bundle becomes TensorRT plans on its GPU."""

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.console import Console

from hawk_trt.apps.cli.main import INTERRUPTED, make_app, run_app
from hawk_trt.apps.cli.models import expect_exported
from hawk_trt.apps.cli.options import Json
from hawk_trt.apps.cli.output import note, print_json, progress, size, table
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import EngineFolder, Machine, PlanEntry
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.files import cache_folder
from hawk_trt.runtime.tensorrt import missing_for_tensorrt

from .build_plan import BuildSettings, BuiltPlan, differences, plan_build
from .checks.inspection import Fusion, inspect
from .checks.verify import Verification, load_reference, verify
from .plugin_library import existing_plugin, find_or_compile, may_find
from .prepare import PreparedGraph
from .profiles import TENSORRT_TARGETS, LargestRequest, choose_target
from .workarounds import workarounds_for
from .writer import write_engines

_BUILD, _CHECK = Group("The build", sort_key=3), Group("The check after it", sort_key=4)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    return run_app(make_app("python -m engines", command=build), arguments)


def build(
    bundle: Path,
    largest: LargestRequest = LargestRequest(),
    *,
    out: Path,
    target: Annotated[str | None, Parameter(choices=TENSORRT_TARGETS)] = None,
    plugin: Annotated[str | None, Parameter(group=_BUILD)] = None,
    workspace_gib: Annotated[float | None, Parameter(group=_BUILD)] = None,
    timing_cache: Annotated[str | None, Parameter(group=_BUILD)] = None,
    force: Annotated[bool, Parameter(group=_BUILD)] = False,
    verbose: Annotated[bool, Parameter(group=_BUILD)] = False,
    no_verify: Annotated[bool, Parameter(group=_CHECK)] = False,
    reference: Annotated[Path | None, Parameter(group=_CHECK)] = None,
    json: Json = False,
) -> int:
    """Build TensorRT engines from a bundle, on the GPU that will run them.

    Example: hawk-trt build artifacts/3b --out artifacts/3b-engines

    Args:
        bundle: folder that hawk-trt export wrote
        out: the engines' folder
        target: of the graphs (default: tensorrt from TensorRT 10.15 on)
        plugin: file of the top-k plugin, or none (default: what make plugin built; else it is compiled where cmake
            and nvcc are)
        workspace_gib: scratch that a kernel may take (default: all free memory)
        timing_cache: file of measured kernels, kept between builds, or none (default: in the user's cache)
        force: build again even if nothing changed
        verbose: print TensorRT's whole log on stderr
        no_verify: leave it out
        reference: float32 export to compare with (default: the bundle's reference.npz, else itself, unless bfloat16)
        json: print the result as JSON
    """
    started = time.perf_counter()
    expect_exported(bundle, built=False)
    loaded = Bundle.load(bundle)
    named = None if plugin in (None, "none") else existing_plugin(Path(plugin))
    expected = named is not None or (plugin is None and may_find())
    # What is wrong with them is said before anything is compiled; by the smaller defaults, until the GPU is known.
    largest.limits(loaded.manifest, plugin=expected, shared_memory=True)
    if workspace_gib is not None and workspace_gib <= 0:
        raise InvalidInput(f"--workspace-gib: got {workspace_gib:g}, expected more than 0")
    # made before the build, so that what is wrong with it is said then and not after
    expected_results = None if no_verify else load_reference(loaded, reference)
    try:
        from .builder import TENSORRT_VERSION, build_plan  # the rest of the command works without it

        machine, gpu_bytes, shared_memory = _machine(TENSORRT_VERSION)
    except ImportError as error:
        preflight = "Without a GPU, see whether TensorRT takes the graphs: make preflight"
        raise BackendError(f"{missing_for_tensorrt(error)}. {preflight}") from error
    library = named if plugin is not None else find_or_compile(TENSORRT_VERSION, machine.compute_capability, note)
    size_limits = largest.limits(loaded.manifest, plugin=library is not None, shared_memory=shared_memory)
    chosen = choose_target(loaded.manifest, TENSORRT_VERSION, target)
    cache = Path(timing_cache or cache_folder() / f"timing-{machine.compute_capability}-{TENSORRT_VERSION}.cache")
    settings = BuildSettings(
        plugin=library,
        workspace_bytes=None if workspace_gib is None else int(workspace_gib * 2**30),
        timing_cache=None if timing_cache == "none" else cache,
        workarounds=workarounds_for(TENSORRT_VERSION, size_limits.batch),
        verbose=verbose,
    )
    given = asdict(largest) | {"target": target, "plugin": plugin, "workspace_gib": workspace_gib}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    rebuild = shlex.join(["hawk-trt", "build", str(bundle), "--out", str(out), *chain(*flags)])
    plan = plan_build(loaded, machine, chosen, size_limits, settings, rebuild)
    changed = differences(plan, out)
    if changed:
        note(f"building again, since another: {', '.join(changed)}")
    if changed == [] and not force:
        _report(EngineFolder.load(out), None, {}, None, as_json=json)
        return 0

    def build_stage(graph: PreparedGraph, entry: PlanEntry) -> BuiltPlan:
        note(f"building {graph.file.name}")
        with progress(f"percent of {graph.file.name} built") as show:
            return build_plan(graph, entry.profiles, settings, show)

    check = None if no_verify else lambda folder: verify(folder, expected_results)
    try:
        engines, verification = write_engines(plan, out, build_stage, check, note, gpu_bytes)
    except KeyboardInterrupt:
        note("interrupted; nothing was changed")
        return INTERRUPTED
    _report(engines, verification, inspect(engines), time.perf_counter() - started, as_json=json)
    return 0


def _machine(tensorrt: str) -> tuple[Machine, int, bool]:
    """The machine, the bytes of its GPU's memory, and whether that is the machine's own, as on a Jetson."""
    from hawk_trt.runtime.tensorrt.cuda import call, shares_memory, this_machine  # needs cuda-bindings

    return this_machine(tensorrt), int(call("cuDeviceTotalMem", call("cuDeviceGet", 0))), shares_memory()


def _report(
    engines: EngineFolder,
    verification: Verification | None,
    attention: Mapping[str, Fusion],
    seconds: float | None,
    *,
    as_json: bool,
) -> None:
    """Print the result on stdout; where nothing was built, seconds is None and attention empty."""
    manifest = engines.manifest
    plan_bytes = {plan.stage: manifest.files[plan.file].size_bytes for plan in manifest.plans}
    if as_json:
        result = {
            "folder": str(engines.folder),
            "up_to_date": seconds is None,
            "target": manifest.target,
            "dtype": manifest.bundle.dtype,
            "weights": manifest.bundle.weights,
            "machine": manifest.machine,
            "limits": manifest.limits,
            "plugin": manifest.plugin,
            "plans": [{"stage": plan.stage, "size_bytes": plan_bytes[plan.stage], "layers": plan.layers,
                       "plugin_layers": plan.plugin_layers, "flags": plan.flags, "workarounds": plan.workarounds,
                       "attention": attention.get(plan.stage), "seconds": plan.seconds} for plan in manifest.plans],
            "verification": verification,
            "seconds": seconds,
        }  # fmt: skip
        print_json(result)
        return
    what = "up to date, nothing built (--force builds again)" if seconds is None else f"built in {seconds:.0f} s"
    sizes = manifest.limits
    print(f"{engines.folder}: {what}")
    print(f"  {manifest.bundle.precision}, {manifest.target}, for {manifest.machine}")
    print(
        f"  prompts of up to {sizes.prompt_tokens} tokens, {sizes.visual_tokens} of them visual; "
        f"{sizes.context} kept and generated; batch {sizes.batch}"
    )
    for plan in manifest.plans:
        layers = f"{plan.layers} layers" + (", the top-k plugin among them" if plan.plugin_layers else "")
        fusion = f", {attention[plan.stage]}" if plan.stage in attention else ""
        print(f"  {plan.stage}: {size(plan_bytes[plan.stage])}, {layers}, {plan.seconds:.0f} s{fusion}")
    if verification is not None:
        _print_verification(verification)
    elif seconds is not None:
        print("  not verified (--no-verify)")


def _print_verification(verification: Verification) -> None:
    """Print a row an output, and what was not compared."""
    shown = table("stage", "output", "prompts", "worst", "", left=2, gap=1)
    for row in verification.rows:
        verdict = "[red]WRONG[/red]" if row.failures else "[green]ok[/green]"
        shown.add_row(row.stage, row.output, str(row.prompts), row.numbers, verdict)
    Console().print(shown)
    print(f"compared with {verification.reference}" if verification.reference else verification.not_compared)


if __name__ == "__main__":
    sys.exit(main())
