"""What a user may name as a model: a bundle, engines, or a checkpoint, which is exported first, once."""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Literal

from hawk_trt.apps.cli.main import where_it_lies
from hawk_trt.apps.cli.output import note, progress
from hawk_trt.bundle import ENGINES_MANIFEST, MANIFEST
from hawk_trt.errors import BundleError, CheckpointError
from hawk_trt.files import cache_folder
from hawk_trt.inputs.checkpoint_files import download, is_hub_id

Kind = Literal["bundle", "engines", "checkpoint", "hub id", "nothing"]


def kind_of(name: str | Path) -> Kind:
    """What a name stands for, by the manifest that lies there."""
    if (Path(name) / ENGINES_MANIFEST).is_file():
        return "engines"
    if (Path(name) / MANIFEST).is_file():
        return "bundle"
    if (Path(name) / "config.json").is_file():
        return "checkpoint"
    return "hub id" if is_hub_id(str(name)) else "nothing"


def ready(model: Path) -> Path:
    """The folder to load: the one that is named, or that of a checkpoint's bundle in the user's cache.

    Raises:
        HawkError: the checkpoint cannot be exported.
    """
    kind = kind_of(model)
    if kind not in ("checkpoint", "hub id"):
        return model
    name = str(model) if kind == "hub id" else str(model.resolve())
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    folder = cache_folder() / "bundles" / f"{Path(name).name}-{digest}"
    # imported by name, since they lie inside hawk_trt once installed, and only a checkpoint needs them
    opened = import_module(where_it_lies("export.checkpoint")).Checkpoint.open(
        download(name) if kind == "hub id" else name
    )
    writer = import_module(where_it_lies("export.writer"))
    options, source = writer.ExportOptions(), name if kind == "hub id" else None
    if writer.up_to_date(opened, folder, options, source) is None:
        note(f"{model}: a checkpoint. Exporting it in float32 to {folder}, once. Other dtypes: hawk-trt export --help")
        with progress("of weights", in_bytes=True) as show:
            writer.export(opened, folder, options, name=source, progress=show)
    return folder


def expect_checkpoint(name: str) -> None:
    """Refuse a bundle or engines in the place of a checkpoint.

    Raises:
        CheckpointError: it is one of these.
    """
    kind = kind_of(name)
    if kind == "bundle":
        raise CheckpointError(
            f"{name}: a bundle, which is exported already. Ask it: hawk-trt run {name} --prompt TEXT. "
            f"Engines from it: hawk-trt build {name} --out {name}-engines"
        )
    if kind == "engines":
        raise CheckpointError(f"{name}: engines, expected a checkpoint. Ask them: hawk-trt run {name} --prompt TEXT")


def expect_bundle(name: Path) -> None:
    """Refuse a checkpoint or engines in the place of a bundle.

    Raises:
        BundleError: it is one of these.
    """
    kind = kind_of(name)
    if kind in ("checkpoint", "hub id"):
        raise BundleError(
            f"{name}: a checkpoint, expected a bundle. Make one: hawk-trt export {name} --out {name.name}-bundle"
        )
    if kind == "engines":
        raise BundleError(f"{name}: engines, which are built already. Ask them: hawk-trt run {name} --prompt TEXT")
