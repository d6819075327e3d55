"""Checks a bundle, or an engine folder, by hash, with a progress bar on stderr."""

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hawk_trt.apps.cli.output import note, size
from hawk_trt.bundle import Bundle, read_manifest
from hawk_trt.engine_folder import EngineFolder, read_engine_manifest
from hawk_trt.runtime.backends import backend_for


def verify(folder: Path) -> Bundle:
    """Read every file of a bundle or engine folder and compare its sha256 with the manifest.

    Raises:
        BundleError: nothing to load there, or a file is missing or differs.
    """
    engines = backend_for(folder) == "tensorrt"
    if engines:
        manifest = read_engine_manifest(folder)
        files = {**manifest.bundle.files, **manifest.files}
    else:
        files = read_manifest(folder).files
    total_bytes = sum(entry.size_bytes for entry in files.values())

    def load(progress: Callable[[int], None] | None) -> Bundle:
        if engines:
            return EngineFolder.load(folder, verify=True, progress=progress).bundle
        return Bundle.load(folder, verify=True, progress=progress)

    if not sys.stderr.isatty():
        note(f"verifying {len(files)} files, {size(total_bytes)}")
        return load(None)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=total_bytes)
        return load(lambda count: progress.advance(task, count))
