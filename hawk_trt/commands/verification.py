"""Checks a bundle by hash, with a progress bar on stderr."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hawk_trt.bundle import Bundle, read_manifest
from hawk_trt.commands.output import note, size


def verify(folder: Path) -> Bundle:
    """Read every file of a bundle and compare its sha256 with the manifest.

    Raises:
        BundleError: no bundle there, or a file is missing or differs.
    """
    manifest = read_manifest(folder)
    total_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    if not sys.stderr.isatty():
        note(f"verifying {len(manifest.files)} files, {size(total_bytes)}")
        return Bundle.load(folder, verify=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=total_bytes)
        return Bundle.load(folder, verify=True, progress=lambda count: progress.advance(task, count))
