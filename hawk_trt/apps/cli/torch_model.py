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
    """Load a checkpoint's folder or hub id; quantised weights are dequantised here, as an export reads them."""
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else download(str(checkpoint))
    return Reference.load(
        folder,
        head_weights=head_weights,
        normalization=normalization,
        device=device,
        dtype=dtype,
        weights=_dequantised(folder),
    )


def _dequantised(folder: Path) -> Callable[[str], Iterator[npt.NDArray[Any]] | None] | None:
    """The values of a tensor by the model's name of it, where the checkpoint is quantised; see Reference.load."""
    formats, reader, tensors = (
        import_module(where_it_lies(f"export.{name}")) for name in ("formats", "checkpoint", "tensors")
    )
    config = reader.read_json(folder / reader.CONFIG)
    if formats.quantisation_settings(folder, config) is None:
        return None
    opened, names = reader.Checkpoint.open(folder), tensors.tensor_names(config)

    def weights(name: str) -> Iterator[npt.NDArray[Any]] | None:
        parts = names(name)
        if not all(map(opened.has, parts)):
            return None
        return (block for part in parts for block in opened.tensor(part).blocks())

    return weights
