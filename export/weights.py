"""Where each weight of a bundle lies, decided while graphs are built, and the streaming that puts it there.

In: a checkpoint, a dtype, and how matrices are quantised, if they are. Out: external-data initializers for the
graphs, then the .data files themselves, or, linked, the checkpoint's own files. A weight is placed once, at the first
request; every target and stage that asks again shares the place. No more than a few blocks of weights are ever in
memory, or one quantised matrix.
"""

import errno
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hawk_trt.bundle import FileEntry, TableEntry, WeightFormat, file_entry, numpy_dtype
from hawk_trt.errors import BundleError, CheckpointError
from hawk_trt.inputs.tensor_file import CheckpointTensor, alternating_buffers

from .checkpoint import Checkpoint
from .quantisation import is_quantised, layout, quantise
from .tensors import EMBEDDINGS

EMBEDDINGS_FILE = "embed_tokens.data"

_IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_INTEGERS = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
# Vector loads want 64 bytes; large tensors begin on a page, so that they can be memory-mapped alone.
_ALIGNMENT = 64
_PAGE = 4096
_PAGE_ALIGNED_FROM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor and where it lies in the bundle: file, offset of its first byte, size; how it is quantised, if it is."""

    tensor: CheckpointTensor
    file: str
    offset: int
    nbytes: int
    weights: WeightFormat | None = None


@dataclass(slots=True)
class WeightStore:
    """The weights of one bundle.

    Attributes:
        checkpoint: they come from.
        dtype: they get: float32, float16 or bfloat16.
        link: use the checkpoint's own files, hard-linked, instead of copies.
        weights: how the language model's matrices are quantised, None where they are not.
    """

    checkpoint: Checkpoint
    dtype: str
    link: bool = False
    weights: WeightFormat | None = None
    _placements: dict[tuple[str, WeightFormat | None], Placement] = field(default_factory=dict, repr=False)
    _sizes: dict[str, int] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return self.checkpoint.has(name)

    def initializer(self, stage_file: str, name: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        """A new initializer for a graph, whose data is a place in an external file.

        Args:
            stage_file: the file it is placed in if it has no place yet, such as "decoder.data".
            name: canonical name of the tensor, and the value's name.
            shape: to give it instead of the checkpoint's, of the same size.

        Raises:
            CheckpointError: no such tensor, another size, or linked and of another dtype.
        """
        placement = self._place(stage_file, name)
        stored = placement.tensor.shape
        if shape is not None and math.prod(shape) != math.prod(stored):
            raise CheckpointError(
                f"{placement.tensor.file}: tensor {name}: shape {list(stored)}, config.json asks for {list(shape)}"
            )
        shape = stored if shape is None else shape
        return _external(name, placement.file, placement.offset, placement.nbytes, _IR_DTYPES[self.dtype], shape)

    def quantised(self, stage_file: str, name: str) -> tuple[ir.Value, ir.Value, WeightFormat] | None:
        """New initializers of a quantised matrix, or None where it stays in floating point.

        Args:
            stage_file: the file it is placed in if it has no place yet.
            name: canonical name of the tensor.

        Returns:
            The integers [in, out], the scales [in / block_size, out] and how they were made.

        Raises:
            CheckpointError: no such tensor.
        """
        if self.weights is None or not is_quantised(name, self.checkpoint.shape(name), self.weights):
            return None
        placement = self._place(stage_file, name, self.weights)
        file, start, (rows, columns) = placement.file, placement.offset, placement.tensor.shape
        nbytes, scales_start, scales_nbytes = layout((rows, columns), self.weights, self.dtype)
        integers = _external(f"{name}/integers", file, start, nbytes, _INTEGERS[self.weights.bits], (columns, rows))
        blocks = (columns // self.weights.block_size, rows)
        scales = _external(f"{name}/scales", file, start + scales_start, scales_nbytes, _IR_DTYPES[self.dtype], blocks)
        return integers, scales, self.weights

    def table(self, name: str = EMBEDDINGS) -> TableEntry:
        """The place of the token embedding table; where a graph has it already (tied), that place.

        Raises:
            CheckpointError: no such tensor, not a table, or linked and of another dtype.
        """
        placement = self._place(EMBEDDINGS_FILE, name)
        shape = placement.tensor.shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{placement.tensor.file}: tensor {name}: shape {list(shape)}, expected two dimensions"
            )
        return TableEntry(placement.file, placement.offset, self.dtype, (shape[0], shape[1]))

    @property
    def total_bytes(self) -> int:
        """Size of all files together, linked ones included."""
        return sum(self._sizes.values())

    @property
    def disk_bytes(self) -> int:
        """What write takes from the disk."""
        return 0 if self.link else self.total_bytes

    def write(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, FileEntry]:
        """Write or link every file into a folder.

        Args:
            folder: that gets them.
            progress: called with the bytes done and their total.

        Raises:
            CheckpointError: a source file that cannot be read, or a value too large for float16.
            BundleError: a file that cannot be hard-linked.
            OSError: writing failed.
        """
        done_bytes = 0

        def advance(nbytes: int) -> None:
            nonlocal done_bytes
            done_bytes += nbytes
            if progress is not None:
                progress(done_bytes, self.total_bytes)

        if self.link:
            return {name: self._link(folder, name, advance) for name in self._sizes}
        with ThreadPoolExecutor(max_workers=2) as workers:
            return {name: self._write_file(folder / name, workers, advance) for name in self._sizes}

    def _place(self, stage_file: str, name: str, weights: WeightFormat | None = None) -> Placement:
        """The tensor's place, the next free one of stage_file at its first request."""
        if (name, weights) in self._placements:
            return self._placements[name, weights]
        tensor = self.checkpoint.tensor(name)
        if self.link:
            placement = self._place_linked(tensor)
        else:
            nbytes = math.prod(tensor.shape) * numpy_dtype(self.dtype).itemsize
            if weights is not None:
                rows, columns = tensor.shape
                _, scales_start, scales_nbytes = layout((rows, columns), weights, self.dtype)
                nbytes = scales_start + scales_nbytes
            alignment = _PAGE if nbytes >= _PAGE_ALIGNED_FROM_BYTES else _ALIGNMENT
            offset = -(-self._sizes.get(stage_file, 0) // alignment) * alignment
            placement = Placement(tensor, stage_file, offset, nbytes, weights)
            self._sizes[stage_file] = offset + nbytes
        self._placements[name, weights] = placement
        return placement

    def _place_linked(self, tensor: CheckpointTensor) -> Placement:
        if tensor.dtype != self.dtype:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: {tensor.dtype}, and linked weights cannot be converted to "
                f"{self.dtype}. Drop --link, or give --dtype {tensor.dtype}"
            )
        self._sizes[tensor.file.name] = tensor.file.stat().st_size
        return Placement(tensor, tensor.file.name, tensor.offset, tensor.nbytes)

    def _link(self, folder: Path, name: str, advance: Callable[[int], None]) -> FileEntry:
        """Hard-link one file of the checkpoint; ONNX Runtime refuses symbolic links that leave the bundle."""
        source = (self.checkpoint.folder / name).resolve()
        try:
            os.link(source, folder / name)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
            raise BundleError(
                f"{source}: cannot be hard-linked into {folder.parent} ({error.strerror}). "
                "Drop --link, or choose --out on the checkpoint's own file system"
            ) from error
        return file_entry(source, weights=True, progress=advance)

    def _write_file(self, path: Path, workers: ThreadPoolExecutor, advance: Callable[[int], None]) -> FileEntry:
        """Write one .data file; a block is written and hashed by two threads while the next is made."""
        digest = hashlib.sha256()
        with path.open("wb", buffering=0) as out:
            pending: tuple[Future[None], ...] = ()
            for block in self._blocks(path.name):
                for future in pending:
                    future.result()
                pending = (workers.submit(_write_all, out, block), workers.submit(digest.update, block))
                advance(len(block))
            for future in pending:
                future.result()
        return FileEntry(digest.hexdigest(), self._sizes[path.name], weights=True)

    def _blocks(self, name: str) -> Iterator[memoryview]:
        """The content of one .data file, in order: aligned tensors and the zeros between them."""
        position = 0
        for placement in self._placements.values():
            if placement.file != name:
                continue
            if placement.offset > position:
                yield memoryview(bytes(placement.offset - position))
            for block in self._content(placement):
                yield block.view(np.uint8).data  # as bytes, since the buffer protocol knows no bfloat16
            position = placement.offset + placement.nbytes

    def _content(self, placement: Placement) -> Iterator[npt.NDArray[Any]]:
        """What is written at a placement: 1-D arrays."""
        if placement.weights is None:
            yield from _converted(placement.tensor, self.dtype)
            return
        integers, scales = quantise(placement.tensor, placement.weights, self.dtype)
        yield integers.reshape(-1)
        yield np.zeros(placement.nbytes - integers.nbytes - scales.nbytes, np.uint8)
        yield scales.reshape(-1)


def _external(name: str, file: str, offset: int, nbytes: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """An initializer whose data lies in an external file."""
    data = ir.ExternalTensor(file, offset, nbytes, dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=data)


def _write_all(out: FileIO, block: memoryview) -> None:
    while block:
        block = block[out.write(block) :]


def _converted(tensor: CheckpointTensor, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """A tensor's elements in another dtype, rounded to nearest even: 1-D arrays, each valid until the next but one.

    Raises:
        CheckpointError: a finite value becomes infinite.
    """
    if tensor.dtype == dtype:
        yield from tensor.blocks()
        return
    buffers = alternating_buffers(math.prod(tensor.shape), numpy_dtype(dtype))
    for block, buffer in zip(tensor.blocks(), buffers, strict=False):
        converted = buffer[: block.size]
        with np.errstate(over="ignore"):  # looked for below, since ml_dtypes raises no flag
            np.copyto(converted, block, casting="unsafe")
        if _may_overflow(converted) and np.isinf(converted).sum() != np.isinf(block).sum():
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: its largest magnitude, {_largest_finite(tensor):g}, "
                f"does not fit {dtype}. Export with --dtype bfloat16 or float32"
            )
        yield converted


def _may_overflow(block: npt.NDArray[Any]) -> bool:
    """Whether an element is infinite or NaN, by its bits: np.isinf takes longer than the conversion itself.

    From infinity's bits upwards lie only infinities and NaNs, for either sign.
    """
    signed, unsigned = np.dtype(f"i{block.itemsize}"), np.dtype(f"u{block.itemsize}")
    infinities = np.array([np.inf, -np.inf], block.dtype)
    return bool(
        block.view(signed).max() >= infinities.view(signed)[0]
        or block.view(unsigned).max() >= infinities.view(unsigned)[1]
    )


def _largest_finite(tensor: CheckpointTensor) -> float:
    """The largest magnitude among a tensor's finite elements."""
    blocks = (np.abs(block.astype(np.float64)) for block in tensor.blocks())
    return max(float(np.max(block, where=np.isfinite(block), initial=0.0)) for block in blocks)
