"""Where each weight of a bundle lies, decided while graphs are built, and the streaming that puts it there.

In: a checkpoint, a dtype, and how matrices are quantised, if they are. Out: external-data initializers for the
graphs, then the .data files themselves, or, linked, the checkpoint's own files. A weight is placed once, at the first
request; every target and stage that asks again shares the place. Of each of the two files that are written at a time
no more than a few blocks are ever in memory, or one matrix that is quantised or filled up.
"""

import errno
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from xxhash import xxh3_128

from hawk_trt.bundle import FileEntry, TableEntry, WeightFormat, file_entry, numpy_dtype
from hawk_trt.errors import BundleError, CheckpointError
from hawk_trt.stages import PORTABLE, TENSORRT

from .checkpoint import Checkpoint
from .quantisation import WHOLE_ROW, block_size, fits_blocks, layout, may_be_quantised, quantise
from .stored import Float8Matrix, IntegerMatrix, Part
from .tensor_file import CheckpointTensor, alternating_buffers, not_finite
from .tensors import EMBEDDINGS, padded_shape

EMBEDDINGS_FILE = "embed_tokens.data"
# By the names of dtypes that bundles use.
ONNX_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int4": onnx.TensorProto.INT4,
    "int8": onnx.TensorProto.INT8,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}

# Vector loads want 64 bytes; large tensors begin on a page, so that they can be memory-mapped alone.
_ALIGNMENT = 64
_PAGE = 4096
_PAGE_ALIGNED_FROM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """Where something lies in the bundle: file, offset of its first byte, size; and what makes its bytes."""

    file: str
    offset: int
    nbytes: int
    content: Callable[[], Iterator[npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """Initializers of a matrix's parts in a graph."""

    values: onnx.TensorProto  # integers [in, out], or float8 [out, in]
    # of blocks of block_size inputs: [in / block_size, out], or [out]; of float8 [], [out] or [out, in / block_size]
    scales: onnx.TensorProto
    scales_dtype: str  # float32 where the model's dtype could not hold them
    block_size: int  # 0 where a scale is of a whole row or of all
    zero_points: onnx.TensorProto | None = (
        None  # as the integers, for each scale; None where all are 0, or the target takes none
    )
    # [in / block_size, out], for targets that take no zero points; see stored.IntegerMatrix.shift
    shift: onnx.TensorProto | None = None
    input_scale: onnx.TensorProto | None = None  # [], of the activations of float8
    # int64 [in], the inputs in the order that the values have them; None where that is the usual one
    order: onnx.TensorProto | None = None

    @property
    def is_float8(self) -> bool:
        """Whether the values are float8 [out, in], not integers [in, out]."""
        return self.values.data_type == onnx.TensorProto.FLOAT8E4M3FN

    @property
    def by_row(self) -> bool:
        """Whether they are integers with one scale an output, not a block."""
        return not self.is_float8 and len(self.scales.dims) == 1


@dataclass(slots=True)
class WeightStore:
    """The weights of one bundle."""

    checkpoint: Checkpoint  # they come from
    dtype: str  # they get: float32, float16 or bfloat16
    link: bool = False  # use the checkpoint's own files, hard-linked, instead of copies
    # how the language model's matrices are to be quantised, None where they stay as they are
    weights: WeightFormat | None = None
    scoring_layer: int = 0  # whose query and key projections stay floats, since they make the scores
    _placements: dict[str, Placement] = field(default_factory=dict, repr=False)
    _sizes: dict[str, int] = field(default_factory=dict, repr=False)

    def initializer(
        self, stage_file: str, name: str, shape: tuple[int, ...], *, flat: bool = False
    ) -> onnx.TensorProto:
        """A new initializer for a graph, whose data is a place in an external file.

        stage_file: the file it is placed in if it has no place yet, such as "decoder.data".  name: canonical, of the
        tensor and of the value.  flat: make one of all dimensions but the first.

        Raises:
            CheckpointError: no such tensor, another shape, or linked and of another dtype.
        """
        placement = self._place_tensor(stage_file, name, shape)
        first, *others = self._shape(name, shape)
        return _external(name, placement, self.dtype, (first, math.prod(others)) if flat else (first, *others))

    def quantised(self, stage_file: str, name: str, shape: tuple[int, int], target: str) -> QuantisedMatrix | None:
        """New initializers of a quantised matrix, or None where it is one of plain floats; see initializer.

        A matrix that the checkpoint holds as integers stays so, but for those that make the scores; one of float8 stays
        so for the target tensorrt.
        """
        tensor, weights, dtype = self.checkpoint.tensor(name, shape), self.weights, self.dtype
        if not may_be_quantised(name, shape, self.scoring_layer):
            return None
        if isinstance(tensor, IntegerMatrix):
            parts = self._parts(stage_file, name, tensor.parts_in_graph(dtype, target))
            return QuantisedMatrix(**parts, scales_dtype=dtype, block_size=tensor.format.block_size)
        if isinstance(tensor, Float8Matrix) and target == TENSORRT:
            parts = self._parts(stage_file, name, tensor.parts_in_graph(dtype))
            return QuantisedMatrix(**parts, scales_dtype=tensor.scales_dtype(dtype), block_size=tensor.block_size)
        if weights is None or not fits_blocks(shape, weights):
            return None
        columns = shape[1]
        nbytes, scales_start, scales_nbytes = layout(shape, weights, dtype)

        def content() -> Iterator[npt.NDArray[Any]]:
            integers, scales = quantise(tensor, weights, dtype)
            yield integers.reshape(-1)
            yield np.zeros(scales_start - nbytes, np.uint8)
            yield scales.reshape(-1)

        place = self._place(stage_file, f"{name}/quantised", scales_start + scales_nbytes, content)
        integers_at = replace(place, nbytes=nbytes)
        scales_at = replace(place, offset=place.offset + scales_start, nbytes=scales_nbytes)
        block = block_size(columns, weights)
        scales_shape: tuple[int, ...] = (columns // block, shape[0])
        if weights.block_size == WHOLE_ROW and target in (TENSORRT, PORTABLE):
            # of all blocks alike, the first
            scales_at = replace(scales_at, nbytes=scales_nbytes // scales_shape[0])
            scales_shape = scales_shape[1:]
        return QuantisedMatrix(
            _external(f"{name}/integers", integers_at, f"int{weights.bits}", shape[::-1]),
            _external(f"{name}/scales", scales_at, dtype, scales_shape),
            dtype,
            block,
        )

    def _parts(self, stage_file: str, name: str, parts: dict[str, Part]) -> dict[str, onnx.TensorProto]:
        """New initializers of the parts of a matrix that the checkpoint holds quantised."""
        values = {}
        for word, part in parts.items():
            label = f"{name}/{'integers' if word == 'values' and part.dtype.startswith('int') else part.label or word}"
            place = self._place(stage_file, label, part.nbytes, part.make)
            values[word] = _external(label, place, part.dtype, part.shape)
        return values

    def table(self, shape: tuple[int, int]) -> TableEntry:
        """The place of the token embedding table; where a graph has it already (tied), that place."""
        placement = self._place_tensor(EMBEDDINGS_FILE, EMBEDDINGS, shape)
        return TableEntry(placement.file, placement.offset, self.dtype, shape)

    @property
    def total_bytes(self) -> int:
        """Size of all files together, linked ones included."""
        return sum(self._sizes.values())

    @property
    def disk_bytes(self) -> int:
        """What write takes from the disk."""
        return 0 if self.link else self.total_bytes

    @contextmanager
    def writing(
        self, folder: Path, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Callable[[], dict[str, FileEntry]]]:
        """Write or link every file into a folder, two at a time, by threads; leaving the context stops them.

        progress is called with the bytes done and their total.

        Yields:
            A function that waits for all files, and returns what a manifest says of them.

        Raises:
            CheckpointError: a source file that cannot be read, or a value too large for float16.
            BundleError: a file that cannot be hard-linked.
            OSError: writing failed.
        """
        done_bytes, lock, stopped = 0, Lock(), Event()

        def advance(nbytes: int) -> None:
            nonlocal done_bytes
            if stopped.is_set():
                raise CancelledError
            with lock:
                done_bytes += nbytes
                if progress is not None:
                    progress(done_bytes, self.total_bytes)

        with ThreadPoolExecutor(max_workers=2) as workers:
            write = self._link if self.link else self._write_file
            files = {name: workers.submit(write, folder, name, advance) for name in self._sizes}

            def finish() -> dict[str, FileEntry]:
                for file in wait(files.values(), return_when=FIRST_EXCEPTION).done:
                    file.result()
                return {name: file.result() for name, file in files.items()}

            try:
                yield finish
            finally:
                stopped.set()

    def _place_tensor(self, stage_file: str, name: str, shape: tuple[int, ...]) -> Placement:
        """The place of a tensor in the bundle's dtype."""
        tensor, shape = self.checkpoint.tensor(name, shape), self._shape(name, shape)
        if not self.link:
            make = _converted if shape == tensor.shape else partial(_padded, shape)
            nbytes = math.prod(shape) * numpy_dtype(self.dtype).itemsize
            return self._place(stage_file, name, nbytes, lambda: make(tensor, self.dtype))
        if tensor.dtype != self.dtype:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: {tensor.dtype}, and linked weights cannot be converted to "
                f"{self.dtype}. Drop --link, or give --dtype {tensor.dtype}"
            )
        self._sizes[tensor.file.name] = tensor.file.stat().st_size
        return Placement(tensor.file.name, tensor.offset, tensor.nbytes, tensor.blocks)

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """In graphs; linked files have no room for zeros."""
        return shape if self.link else padded_shape(name, shape)

    def _place(
        self, stage_file: str, key: str, nbytes: int, content: Callable[[], Iterator[npt.NDArray[Any]]]
    ) -> Placement:
        """The place of what bears a key, the next free one of stage_file at its first request."""
        if key not in self._placements:
            alignment = _PAGE if nbytes >= _PAGE_ALIGNED_FROM_BYTES else _ALIGNMENT
            offset = -(-self._sizes.get(stage_file, 0) // alignment) * alignment
            self._placements[key] = Placement(stage_file, offset, nbytes, content)
            self._sizes[stage_file] = offset + nbytes
        return self._placements[key]

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

    def _write_file(self, folder: Path, name: str, advance: Callable[[int], None]) -> FileEntry:
        """Write one .data file; a block is written and hashed by another thread while the next is made."""
        digest = xxh3_128()

        def put(block: memoryview) -> None:
            out.write(block)
            digest.update(block)
            advance(len(block))

        with (folder / name).open("wb") as out, ThreadPoolExecutor(max_workers=1) as writer:
            written: Future[None] = writer.submit(lambda: None)
            for block in self._blocks(name):
                written.result()
                written = writer.submit(put, block)
            written.result()
        return FileEntry(digest.hexdigest(), self._sizes[name], weights=True)

    def _blocks(self, name: str) -> Iterator[memoryview]:
        """The content of one .data file, in order: aligned tensors and the zeros between them."""
        position = 0
        for placement in self._placements.values():
            if placement.file != name:
                continue
            if placement.offset > position:
                yield memoryview(bytes(placement.offset - position))
            for block in placement.content():
                yield block.view(np.uint8).data  # as bytes, since the buffer protocol knows no bfloat16
            position = placement.offset + placement.nbytes


def _external(name: str, place: Placement, dtype: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    """An initializer whose data lies in an external file."""
    where = {"location": place.file, "offset": str(place.offset), "length": str(place.nbytes)}
    return onnx.TensorProto(
        name=name,
        data_type=ONNX_DTYPES[dtype],
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
        external_data=[onnx.StringStringEntryProto(key=key, value=value) for key, value in where.items()],
    )


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
        if not_finite(converted) and np.isinf(converted).sum() != np.isinf(block).sum():
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: its largest magnitude, {_largest_finite(tensor):g}, "
                f"does not fit {dtype}. Export with --dtype bfloat16 or float32"
            )
        yield converted


def _padded(shape: tuple[int, ...], tensor: CheckpointTensor, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """A tensor in another dtype, with zeros behind its elements along each dimension, up to a shape."""
    whole = np.zeros(shape, numpy_dtype(dtype))
    elements = np.concatenate([block.copy() for block in _converted(tensor, dtype)])
    whole[tuple(slice(size) for size in tensor.shape)] = elements.reshape(tensor.shape)
    yield whole.reshape(-1)


def _largest_finite(tensor: CheckpointTensor) -> float:
    """The largest magnitude among a tensor's finite elements."""
    blocks = (np.abs(block.astype(np.float64)) for block in tensor.blocks())
    return max(float(np.max(block, where=np.isfinite(block), initial=0.0)) for block in blocks)
