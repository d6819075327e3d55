"""The files of an engine folder: what the bundle lends, the plans, and what may be overwritten."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from hawk_trt import files
from hawk_trt.bundle import Bundle, FileEntry, Manifest, TableEntry, numpy_dtype
from hawk_trt.engine_folder import ENGINES_MANIFEST, read_engine_manifest
from hawk_trt.errors import BundleError

EMBEDDINGS_FILE = "embed_tokens.data"
_ENGINE_SUFFIXES = (".plan", ".data", ".so", ".json", ".jinja", ".npz")
_BLOCK_BYTES = 1 << 20


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an engine folder.

    Raises:
        BundleError: out is a file, or a folder with other things in it.
    """
    known: set[str] = set()
    if (out / ENGINES_MANIFEST).is_file():
        try:
            manifest = read_engine_manifest(out)
        except BundleError:  # a damaged one of ours
            known = {path.name for path in out.iterdir() if path.suffix in _ENGINE_SUFFIXES}
        else:
            known = {ENGINES_MANIFEST, *manifest.files, *manifest.bundle.files}
    files.check_replaceable(out, known.__contains__, "engine build")


def copy_bundle(bundle: Bundle, manifest: Manifest, folder: Path) -> Manifest:
    """Put a bundle's small files and embedding table into a folder; returns its manifest with these alone."""
    graphs = {graph.file for graph in bundle.manifest.graphs}
    held = {name: entry for name, entry in bundle.manifest.files.items() if not entry.weights and name not in graphs}
    for name in held:
        shutil.copyfile(bundle.folder / name, folder / name)
    table = bundle.manifest.embeddings
    held[EMBEDDINGS_FILE] = _copy_table(bundle, folder / EMBEDDINGS_FILE)
    place = TableEntry(EMBEDDINGS_FILE, 0, table.dtype, table.shape)
    return replace(manifest, files=held, embeddings=place)


def _copy_table(bundle: Bundle, path: Path) -> FileEntry:
    """Link the embedding table where its file holds nothing else, else copy its part of the file."""
    table, size = bundle.manifest.embeddings, table_bytes(bundle)
    source = bundle.folder / table.file
    if (table.offset, source.stat().st_size) == (0, size):
        try:
            os.link(source.resolve(), path)
            return bundle.manifest.files[table.file]
        except OSError:
            pass  # another file system, or one without hard links: copy
    digest = hashlib.sha256()
    with source.open("rb") as read, path.open("wb") as out:
        read.seek(table.offset)
        left = size
        while left:
            block = read.read(min(_BLOCK_BYTES, left))
            if not block:
                raise BundleError(f"{source}: ends before its embedding table does. Export again: make export")
            digest.update(block)
            out.write(block)
            left -= len(block)
    return FileEntry(digest.hexdigest(), size, weights=True)


def table_bytes(bundle: Bundle) -> int:
    """Size of the embedding table."""
    table = bundle.manifest.embeddings
    return table.shape[0] * table.shape[1] * numpy_dtype(table.dtype).itemsize


def write(path: Path, content: memoryview, *, weights: bool) -> FileEntry:
    """Write from TensorRT's own memory, block by block: a copy of a 15 GB plan would double it."""
    digest = hashlib.sha256()
    content = content.cast("B")
    with path.open("wb") as file:
        for start in range(0, len(content), _BLOCK_BYTES):
            block = content[start : start + _BLOCK_BYTES]
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(digest.hexdigest(), len(content), weights)
