"""One safetensors file: its header, read and checked by hand.

In: a path. Out: where every tensor lies in the file. The format is 8 bytes, the header's length as a
little-endian integer; the header, JSON; then the tensors' bytes, without gaps. We read it ourselves because
streaming and linking need the offsets, which the safetensors package keeps to itself.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import numpy_dtype
from hawk_trt.errors import CheckpointError
from hawk_trt.files import LFS_ADVICE, LFS_POINTER

# Ours of the dtypes of the format: of plain weights, and of the parts of quantised ones.
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
}
# Of 100,000 tensors, which no file of a model has: a longer header would take long to read, or is none.
_MAX_HEADER_BYTES = 16_000_000
# Elements read at a time: conversion is fast while they stay in the CPU's cache.
_BLOCK_ELEMENTS = 1 << 19
_DOWNLOAD_AGAIN = "Download or copy it again"


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a checkpoint; reading it is a CheckpointError where the file cannot be read, or ends early."""

    name: str  # in the file, or canonical once the checkpoint has renamed it
    file: Path  # that holds it
    offset: int  # of its first byte, from the start of the file
    nbytes: int  # its size
    dtype: str  # by numpy's and ml_dtypes' names, such as bfloat16
    shape: tuple[int, ...]  # row-major

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The elements: 1-D arrays of a few MB at most, each valid until the next but one takes its memory."""
        return self.stored()

    def stored(self, unit: int = 1) -> Iterator[npt.NDArray[Any]]:
        """The elements as the file holds them, in such blocks, each of a multiple of so many elements as unit says."""
        dtype = numpy_dtype(self.dtype)
        left = self.nbytes // dtype.itemsize
        buffers = alternating_buffers(left, dtype, unit)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while left:
                    block = next(buffers)[:left]
                    view, filled = block.view(np.uint8).data, 0
                    while filled < len(view):
                        count = file.readinto(view[filled:])
                        if not count:
                            raise CheckpointError(f"{self.file}: tensor {self.name}: the file ends early; it changed")
                        filled += count
                    left -= len(block)
                    yield block
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror})") from error

    def array(self) -> npt.NDArray[Any]:
        """The whole tensor, in its shape."""
        values = np.empty(math.prod(self.shape), numpy_dtype(self.dtype))
        filled = 0
        for block in self.blocks():
            values[filled : filled + len(block)] = block
            filled += len(block)
        return values.reshape(self.shape)


def alternating_buffers(size: int, dtype: np.dtype[Any], unit: int = 1) -> Iterator[npt.NDArray[Any]]:
    """Two uninitialised blocks of up to size elements in turn: one is filled while the other is still being used."""
    length = max(unit, _BLOCK_ELEMENTS // unit * unit)
    return itertools.cycle([np.empty(min(size, length), dtype) for _ in range(2)])


def not_finite(block: npt.NDArray[Any]) -> bool:
    """Whether an element is infinite or NaN, by its bits: np.isfinite takes longer than a conversion.

    From infinity's bits upwards lie only infinities and NaNs, for either sign.
    """
    signed, unsigned = np.dtype(f"i{block.itemsize}"), np.dtype(f"u{block.itemsize}")
    infinities = np.array([np.inf, -np.inf], block.dtype)
    return bool(
        block.view(signed).max() >= infinities.view(signed)[0]
        or block.view(unsigned).max() >= infinities.view(unsigned)[1]
    )


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of one safetensors file, as raw bytes and as the tensors that it describes."""

    path: Path
    header: bytes
    tensors: tuple[CheckpointTensor, ...]


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: truncated, not safetensors, an unknown dtype, or offsets that overlap, leave the file or do
            not fit the shape.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(8)
            length = int.from_bytes(length_bytes, "little")
            if LFS_POINTER.startswith(length_bytes) and length_bytes:
                raise CheckpointError(f"{path}: {LFS_ADVICE}")
            if len(length_bytes) < 8 or length > min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: {size_bytes} bytes, too few for its header of {length}, or more header than a model has: "
                    f"truncated or not safetensors. {_DOWNLOAD_AGAIN}"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    data_start = 8 + length
    entries = _parse(path, header)
    tensors = sorted(
        (_tensor(path, data_start, name, entry) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    _check_layout(path, data_start, size_bytes, tensors)
    return TensorFile(path, header, tuple(tensors))


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The header's entries by tensor name, without its free-form metadata."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: its header names {repeated[:200]!r} twice")
        return entries

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its header is not JSON ({error}): not safetensors. {_DOWNLOAD_AGAIN}"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is no JSON object: not safetensors. {_DOWNLOAD_AGAIN}")
    entries.pop("__metadata__", None)
    return entries


def _tensor(path: Path, data_start: int, name: str, entry: object) -> CheckpointTensor:
    """One checked entry of the header."""
    where = f"{path}: tensor {name[:200]}"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise CheckpointError(f"{where}: got {str(entry)[:200]}, expected dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype[:40]}, expected {', '.join(_DTYPES)}")
    nbytes = math.prod(shape) * numpy_dtype(_DTYPES[dtype]).itemsize
    if end - begin != nbytes:
        got = f"{end - begin} bytes at {begin} to {end}"
        raise CheckpointError(f"{where}: {got}, expected {nbytes} for {dtype} {shape}")
    return CheckpointTensor(name, path, data_start + begin, nbytes, _DTYPES[dtype], tuple(shape))


def _check_layout(path: Path, data_start: int, size_bytes: int, tensors: list[CheckpointTensor]) -> None:
    """Refuse tensors that overlap, leave gaps or end elsewhere than the file does."""
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the one before" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: starts at byte {tensor.offset}, expected {position}: {what}"
            )
        position += tensor.nbytes
        if position > size_bytes:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: ends at byte {position}, the file has {size_bytes}: truncated. "
                f"{_DOWNLOAD_AGAIN}"
            )
    if position != size_bytes:
        raise CheckpointError(
            f"{path}: {size_bytes} bytes, expected {position} from its header: damaged. {_DOWNLOAD_AGAIN}"
        )
