"""A bundle becomes an engine folder: plans, all that the runtime needs beside them, engines.json last.

Plans go to a folder beside the destination, which takes its place at the end: checked, or not at all.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hawk_trt.bundle import FileEntry, file_entry, manifest_bytes
from hawk_trt.engine_folder import ENGINES_MANIFEST, EngineFolder, PlanEntry
from hawk_trt.errors import BackendError, HawkError
from hawk_trt.files import check_free_space, clean_up_after_killed, staged
from hawk_trt.runtime.versions import available_memory_bytes

from .build_plan import BuildPlan
from .checks.verify import Verification
from .contents import check_replaceable, copy_bundle, table_bytes, write
from .memory import memory_warning
from .prepare import PreparedGraph

# For the small files, and for what a plan has beside its weights.
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One built plan as the writer needs it: its content, and what engines.json tells of it."""

    content: memoryview
    layers: int
    plugin_layers: int
    flags: tuple[str, ...]
    seconds: float


def write_engines(
    plan: BuildPlan,
    out: Path,
    build: Callable[[PreparedGraph, PlanEntry], StagePlan],
    check: Callable[[Path], Verification] | None,
    warn: Callable[[str], None],
) -> tuple[EngineFolder, Verification | None]:
    """Build all plans and put the folder in its place.

    Args:
        plan: what is built.
        out: the folder; engines that are there are replaced at the end.
        build: makes the plan of one graph.
        check: looks at the finished folder before it takes its place; None leaves that out.
        warn: called with what the user should know before the first build.

    Raises:
        BackendError: a stage cannot be built, or the plans are wrong; wrong ones are kept in OUT.failed.
        BundleError: out cannot be replaced or written, or the disk is full.
    """
    out = out.resolve()
    check_replaceable(out)
    clean_up_after_killed(out)
    needed_bytes = plan.weight_bytes + table_bytes(plan.bundle) + _SPARE_BYTES
    advice = "Free space, or choose another disk with --out"
    check_free_space(out, needed_bytes, "the engines need", advice)
    warning = memory_warning(plan.graphs, available_memory_bytes())
    if warning is not None:
        warn(warning)
    with staged(out) as folder:
        bundle = copy_bundle(plan.bundle, plan.manifest.bundle, folder)
        files: dict[str, FileEntry] = {}
        entries = []
        for graph, entry in zip(plan.graphs, plan.manifest.plans, strict=True):
            done, files[entry.file] = _build_stage(graph, entry, build, folder)
            entries.append(done)
        name = None
        if plan.plugin is not None and any(entry.plugin_layers for entry in entries):
            name = plan.plugin.name
            shutil.copyfile(plan.plugin, folder / name)
            files[name] = file_entry(folder / name)
        manifest = replace(plan.manifest, bundle=bundle, plans=tuple(entries), plugin=name, files=files)
        write(folder / ENGINES_MANIFEST, memoryview(manifest_bytes(manifest)), weights=False)
        EngineFolder(folder, manifest).check()  # what would not load never takes the place
        verification = None if check is None else _checked(check, folder, out)
    return EngineFolder.load(out), verification


def _checked(check: Callable[[Path], Verification], folder: Path, out: Path) -> Verification:
    """The check's findings where it passes; else the plans, an hour's work maybe, are kept aside."""
    try:
        verification = check(folder)
    except HawkError as error:
        failed = _keep_aside(folder, out)
        raise BackendError(f"the plans could not be checked: {error} They are in {failed}") from error
    if not verification.passed:
        failed = _keep_aside(folder, out)
        raise BackendError(
            f"the plans are wrong: {verification.failures}. They are in {failed}, to look into: docs/tensorrt.md"
        )
    return verification


def _keep_aside(folder: Path, out: Path) -> Path:
    """Move a folder beside its destination, in the place of an earlier one."""
    failed = out.with_name(f"{out.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    return failed


def _build_stage(
    graph: PreparedGraph, entry: PlanEntry, build: Callable[[PreparedGraph, PlanEntry], StagePlan], folder: Path
) -> tuple[PlanEntry, FileEntry]:
    """Build and write one plan; its memory is free again when this returns."""
    built = build(graph, entry)
    file = write(folder / entry.file, built.content, weights=True)
    done = replace(
        entry,
        layers=built.layers,
        plugin_layers=built.plugin_layers,
        flags=built.flags,
        seconds=round(built.seconds, 3),
    )
    return done, file
