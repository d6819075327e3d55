"""The command python -m engines: a bundle becomes TensorRT plans, on the GPU that is to run them."""

import argparse
import shlex
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import EngineFolder, Machine, PlanEntry
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.files import cache_folder
from hawk_trt.runtime.versions import missing_for_tensorrt

from .build_plan import BuiltPlan, differences, plan_build
from .checks.verify import Verification, load_reference, verify
from .plugin_library import find_or_compile, may_find
from .prepare import PreparedGraph
from .profiles import TENSORRT_TARGETS, add_limits, choose_target, limits_of
from .workarounds import workarounds_for
from .writer import write_engines

_FAILED = 1
_INTERRUPTED = 130


def main(arguments: list[str] | None = None, prog: str = "python -m engines") -> int:
    """Run the command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _parser(prog).parse_args(given)
    try:
        _run(args, rebuild=shlex.join([*prog.split(), *given]))
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Build TensorRT plans from an ONNX bundle, on the GPU that is to run them.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that an export wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the engines' folder")
    parser.add_argument(
        "--target", choices=TENSORRT_TARGETS, help="of the graphs (default: tensorrt from TensorRT 10.15 on)"
    )
    add_limits(parser)
    group = parser.add_argument_group("the build")
    group.add_argument(
        "--plugin",
        metavar="PATH",
        help="top-k plugin, or none (default: the one that make plugin built; else compiled where cmake and nvcc are)",
    )
    group.add_argument(
        "--workspace-gib", type=float, metavar="X", help="scratch that a kernel may take (default: all free memory)"
    )
    group.add_argument(
        "--timing-cache",
        metavar="PATH",
        help="measured kernels, kept between builds, or none (default: in the user's cache)",
    )
    group.add_argument("--force", action="store_true", help="build again even if nothing changed")
    group.add_argument("--verbose", action="store_true", help="print TensorRT's whole log on stderr")
    group = parser.add_argument_group("the check after it")
    group.add_argument("--no-verify", action="store_true", help="leave it out")
    group.add_argument(
        "--reference",
        type=Path,
        metavar="BUNDLE",
        help="float32 export of the same checkpoint to compare with (default: the bundle's reference.npz, else "
        "the bundle itself in ONNX Runtime, unless it is bfloat16)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _run(args: argparse.Namespace, rebuild: str) -> None:
    started = time.perf_counter()
    bundle = Bundle.load(args.bundle)
    named = None if args.plugin in (None, "none") else existing_file(Path(args.plugin))
    expected = named is not None or (args.plugin is None and may_find())
    limits_of(args, bundle.manifest, plugin=expected)  # what is wrong with them is said before anything is compiled
    if args.workspace_gib is not None and args.workspace_gib <= 0:
        raise InvalidInput(f"--workspace-gib: got {args.workspace_gib:g}, expected more than 0")
    # made before the build, so that what is wrong with it is said then and not after
    reference = None if args.no_verify else load_reference(bundle, args.reference)
    try:
        from .builder import TENSORRT_VERSION, BuildSettings, build_plan  # the rest of the command works without it

        machine, gpu_bytes = _machine(TENSORRT_VERSION)
    except ImportError as error:
        preflight = "Without a GPU, see whether TensorRT takes the graphs: make preflight"
        raise BackendError(f"{missing_for_tensorrt(error)}. {preflight}") from error
    plugin = named
    if args.plugin is None:
        plugin = find_or_compile(TENSORRT_VERSION, machine.compute_capability, note)
    size_limits = limits_of(args, bundle.manifest, plugin=plugin is not None)
    target = choose_target(bundle.manifest, TENSORRT_VERSION, args.target)
    workarounds = workarounds_for(TENSORRT_VERSION, size_limits.batch)
    settings = BuildSettings(
        plugin=plugin,
        workspace_bytes=None if args.workspace_gib is None else int(args.workspace_gib * 2**30),
        timing_cache=_timing_cache(args.timing_cache, f"{machine.compute_capability}-{TENSORRT_VERSION}"),
        workarounds=workarounds,
        verbose=args.verbose,
    )
    plan = plan_build(
        bundle,
        machine,
        target,
        size_limits,
        plugin=plugin,
        workspace_bytes=settings.workspace_bytes,
        workarounds=workarounds,
        rebuild=rebuild,
    )
    changed = differences(plan, args.out)
    if changed:
        note(f"building again, since another: {', '.join(changed)}")
    if changed == [] and not args.force:
        _report(EngineFolder.load(args.out), None, None, as_json=args.json)
        return

    def build(graph: PreparedGraph, entry: PlanEntry) -> BuiltPlan:
        return build_plan(graph, entry.profiles, settings)

    check = None if args.no_verify else lambda folder: verify(folder, reference)
    engines, verification = write_engines(plan, args.out, build, check, note, gpu_bytes)
    _report(engines, verification, time.perf_counter() - started, as_json=args.json)


def existing_file(path: Path) -> Path:
    """The absolute path of the file that --plugin names.

    Raises:
        InvalidInput: it is not there.
    """
    if not path.is_file():
        raise InvalidInput(f"--plugin: {path} is not there")
    return path.resolve()


def _machine(tensorrt: str) -> tuple[Machine, int | None]:
    """The machine, and the bytes of its GPU's memory."""
    from hawk_trt.runtime.tensorrt.cuda import call, this_machine  # needs cuda-bindings

    return this_machine(tensorrt), int(call("cuDeviceTotalMem", call("cuDeviceGet", 0)))


def _timing_cache(given: str | None, name: str) -> Path | None:
    if given == "none":
        return None
    return Path(given) if given is not None else cache_folder() / f"timing-{name}.cache"


def _report(engines: EngineFolder, verification: Verification | None, seconds: float | None, *, as_json: bool) -> None:
    """Print the result on stdout; seconds is None where nothing was built."""
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
                       "seconds": plan.seconds} for plan in manifest.plans],
            "verification": verification,
            "seconds": seconds,
        }  # fmt: skip
        print(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
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
        plugin = ", the top-k plugin among them" if plan.plugin_layers else ""
        megabytes = plan_bytes[plan.stage] / 1e6
        print(f"  {plan.stage}: {megabytes:.1f} MB, {plan.layers} layers{plugin}, {plan.seconds:.0f} s")
    if verification is not None:
        _print_verification(verification)
    elif seconds is not None:
        print("  not verified, as asked for (--no-verify)")


def _print_verification(verification: Verification) -> None:
    """Print a row an output, and what was not compared."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("stage", "output", "prompts", "worst", ""):
        table.add_column(column, justify="right" if column == "prompts" else "left")
    for row in verification.rows:
        verdict = "[red]WRONG[/red]" if row.failures else "[green]ok[/green]"
        table.add_row(row.stage, row.output, str(row.prompts), row.numbers, verdict)
    Console().print(table)
    print(f"compared with {verification.reference}" if verification.reference else verification.not_compared)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
