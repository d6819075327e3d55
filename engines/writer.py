"""A bundle becomes an engine folder: plans, all that the runtime needs beside them, engines.json last.

Plans go to a folder beside the destination, which takes its place at the end: checked, or not at all.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from hawk_trt.bundle import ENGINES_MANIFEST, Bundle, FileEntry, file_entry, manifest_bytes
from hawk_trt.engine_folder import EngineFolder, PlanEntry, read_engine_manifest
from hawk_trt.errors import BackendError, BundleError, HawkError
from hawk_trt.files.staging import check_free_space, check_replaceable, clean_up_after_killed, staged
from hawk_trt.runtime.versions import available_memory_bytes
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION

from .build_plan import BuildPlan, BuiltPlan
from .checks.verify import Verification
from .prepare import PreparedGraph

EMBEDDINGS_FILE = "embed_tokens.data"
# TensorRT holds the weights as read, in its network, for its tactics and in the plan: three to four times.
BUILD_FACTOR = 4
_ENGINE_SUFFIXES = (".plan", ".data", ".so", ".json", ".jinja", ".npz")
# For the small files, and for what a plan has beside its weights.
_SPARE_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
# What makes the scratch memory of a stage smaller.
_FLAGS = {VISION: "--max-visual-tokens", FIRST_LAYER: "--max-prompt-tokens", DECODER: "--max-context"}


def write_engines(
    plan: BuildPlan,
    out: Path,
    build: Callable[[PreparedGraph, PlanEntry], BuiltPlan],
    check: Callable[[Path], Verification] | None,
    warn: Callable[[str], None],
    gpu_bytes: int | None = None,
) -> tuple[EngineFolder, Verification | None]:
    """Build all plans and put the folder in its place; engines that are there are replaced at the end.

    build makes the plan of one graph; check looks at the finished folder before it takes its place, None leaves that
    out; warn is called with what the user should know before the first build; gpu_bytes is the memory of the GPU.

    Raises:
        HawkError: a stage cannot be built or needs more memory than there is, out cannot be replaced or written, the
            disk is full, or the plans are wrong; wrong ones are kept in OUT.failed.
    """
    out = out.resolve()
    _check_replaceable(out)
    clean_up_after_killed(out)
    weight_bytes = sum(graph.weight_bytes for graph in plan.graphs)
    needed_bytes = weight_bytes + plan.bundle.manifest.embeddings.nbytes + _SPARE_BYTES
    check_free_space(out, needed_bytes, "the engines need", "Free space, or choose another disk with --out")
    if warning := memory_warning(plan.graphs, available_memory_bytes()):
        warn(warning)
    with staged(out) as folder:
        table = replace(plan.bundle.manifest.embeddings, file=EMBEDDINGS_FILE, offset=0)
        bundle = replace(plan.manifest.bundle, files=_copy_bundle(plan.bundle, folder), embeddings=table)
        files: dict[str, FileEntry] = {}
        entries = []
        for graph, entry in zip(plan.graphs, plan.manifest.plans, strict=True):
            done, files[entry.file] = _build_stage(graph, entry, build, folder, gpu_bytes)
            entries.append(done)
        plugin = plan.plugin if any(entry.plugin_layers for entry in entries) else None
        if plugin is not None:
            shutil.copyfile(plugin, folder / plugin.name)
            files[plugin.name] = file_entry(folder / plugin.name)
        name = None if plugin is None else plugin.name
        manifest = replace(plan.manifest, bundle=bundle, plans=tuple(entries), plugin=name, files=files)
        _write(folder / ENGINES_MANIFEST, memoryview(manifest_bytes(manifest)), weights=False)
        EngineFolder(folder, manifest).check()  # what would not load never takes the place
        verification = None if check is None else _checked(check, folder, out)
    return EngineFolder.load(out), verification


def memory_warning(graphs: Sequence[PreparedGraph], available_bytes: int | None) -> str | None:
    """A warning where the largest stage may not fit into memory: an hour's work that is killed helps nobody."""
    largest = max(graphs, key=lambda graph: graph.weight_bytes)
    needed = largest.weight_bytes * BUILD_FACTOR
    if available_bytes is None or needed <= available_bytes:
        return None
    return (
        f"{largest.stage}: {largest.weight_bytes / 1e9:.1f} GB of weights may need {needed / 1e9:.1f} GB of memory to "
        f"build, {available_bytes / 1e9:.1f} GB are free. If the build is killed: close other programs, add swap"
    )


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an engine folder."""
    known: set[str] = set()
    if (out / ENGINES_MANIFEST).is_file():
        try:
            manifest = read_engine_manifest(out)
        except BundleError:  # a damaged one of ours
            known = {path.name for path in out.iterdir() if path.suffix in _ENGINE_SUFFIXES}
        else:
            known = {ENGINES_MANIFEST, *manifest.files, *manifest.bundle.files}
    check_replaceable(out, known.__contains__, "engine build")


def _build_stage(
    graph: PreparedGraph,
    entry: PlanEntry,
    build: Callable[[PreparedGraph, PlanEntry], BuiltPlan],
    folder: Path,
    gpu_bytes: int | None,
) -> tuple[PlanEntry, FileEntry]:
    """Build and write one plan; its memory is free again when this returns."""
    built = build(graph, entry)
    needed = graph.weight_bytes + built.scratch_bytes
    if gpu_bytes is not None and needed > gpu_bytes:
        raise BackendError(
            f"{entry.file}: needs {graph.weight_bytes / 1e9:.1f} GB for weights and {built.scratch_bytes / 1e9:.1f} GB "
            f"of scratch memory at the largest request, this GPU has {gpu_bytes / 1e9:.1f} GB. Build with a smaller "
            f"{_FLAGS[graph.stage]}, or --batch"
        )
    file = _write(folder / entry.file, built.content, weights=True)
    done = replace(
        entry,
        layers=built.layers,
        plugin_layers=built.plugin_layers,
        flags=built.flags,
        seconds=round(built.seconds, 3),
    )
    return done, file


def _checked(check: Callable[[Path], Verification], folder: Path, out: Path) -> Verification:
    """The check's findings where it passes; else the plans, an hour's work maybe, are kept aside."""
    failed = out.with_name(f"{out.name}.failed")
    problem: HawkError | None = None
    try:
        verification = check(folder)
        if verification.passed:
            return verification
        reason, advice = f"the plans are wrong: {verification.failures}.", ", to look into: docs/tensorrt.md"
    except HawkError as error:
        reason, advice, problem = f"the plans could not be checked: {error}", "", error
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    raise BackendError(f"{reason} They are in {failed}{advice}") from problem


def _copy_bundle(bundle: Bundle, folder: Path) -> dict[str, FileEntry]:
    """Put a bundle's small files and embedding table into a folder."""
    graphs = {graph.file for graph in bundle.manifest.graphs}
    files = {name: entry for name, entry in bundle.manifest.files.items() if not entry.weights and name not in graphs}
    for name in files:
        shutil.copyfile(bundle.folder / name, folder / name)
    return {**files, EMBEDDINGS_FILE: _copy_table(bundle, folder / EMBEDDINGS_FILE)}


def _copy_table(bundle: Bundle, path: Path) -> FileEntry:
    """Link the embedding table where its file holds nothing else, else copy its part of the file."""
    table = bundle.manifest.embeddings
    source = bundle.folder / table.file
    if (table.offset, source.stat().st_size) == (0, table.nbytes):
        try:
            os.link(source.resolve(), path)
            return bundle.manifest.files[table.file]
        except OSError:
            pass  # another file system, or one without hard links: copy
    return _write(path, bundle.embedding_table().reshape(-1).view(np.uint8).data, weights=True)


def _write(path: Path, content: memoryview, *, weights: bool) -> FileEntry:
    """Write from TensorRT's own memory, block by block: a copy of a 15 GB plan would double it."""
    digest = xxh3_128()
    content = content.cast("B")
    with path.open("wb") as file:
        for start in range(0, len(content), _BLOCK_BYTES):
            block = content[start : start + _BLOCK_BYTES]
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(digest.hexdigest(), len(content), weights)
