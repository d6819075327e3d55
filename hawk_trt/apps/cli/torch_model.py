"""The checkpoint's own model in PyTorch, for parity and calibration; import this file where torch is needed alone."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy.typing as npt

from hawk_trt.apps.cli.main import where_it_lies
from hawk_trt.apps.cli.models import download
from hawk_trt.apps.parity.reference import Reference


def load_reference(
    checkpoint: str | Path, *, head_weights: Sequence[float], normalization: str, device: str, dtype: str
) -> Reference:
    """Load a checkpoint's folder or hub id; what transformers cannot read alone is read here, as an export reads it."""
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else download(str(checkpoint))
    settings, weights = _own_reading(folder)
    return Reference.load(
        folder,
        head_weights=head_weights,
        normalization=normalization,
        device=device,
        dtype=dtype,
        settings=settings,
        weights=weights,
    )


def _own_reading(
    folder: Path,
) -> tuple[dict[str, Any] | None, Callable[[str], Iterator[npt.NDArray[Any]] | None] | None]:
    """Settings and weights for Reference.load: of an original InternVL both, of a quantised checkpoint its weights."""
    files, formats, checkpoints, tensors, internvl = (
        import_module(where_it_lies(f"export.{name}"))
        for name in ("checkpoint_files", "formats", "checkpoint", "tensors", "internvl_config")
    )
    config = files.read_json(folder / files.CONFIG)
    settings = internvl.as_transformers(config, files.added_tokens(folder))
    if settings is None and formats.quantisation_settings(folder, config) is None:
        return None, None
    opened, names = checkpoints.Checkpoint.open(folder), tensors.tensor_names(config)

    def weights(name: str) -> Iterator[npt.NDArray[Any]] | None:
        parts = names(name)
        if not all(part in opened.tensors for part in parts):
            return None
        return (block for part in parts for block in opened.tensor(part).blocks())

    return settings, weights
