"""Matrices that a checkpoint holds quantised, read as they lie in its files.

In: the parts that a writer stores of a matrix (integers, scales, zero points). Out: a tensor like any other, whose
blocks are the dequantised float32 [out, in]; and, as a blocked DequantizeLinear reads them, the integers themselves:

    w[o, i] = (q[i, o] - z[g, o]) s[g, o]        g = i // block_size; q, z signed: -8 to 7, or -128 to 127

Writers count integers from 0; here 8, or 128, is subtracted of both q and z, which leaves their difference as it is.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import WeightFormat, numpy_dtype
from hawk_trt.errors import CheckpointError
from hawk_trt.stages import CPU, CUDA

from .tensor_file import CheckpointTensor, alternating_buffers, not_finite

# Dequantised at a time.
_CHUNK_ELEMENTS = 1 << 19
# Rearranged at a time: with the temporary array they stay in the CPU's cache.
_CACHED_BYTES = 1 << 18
_TILE_ROWS = 128
# ONNX Runtime multiplies by integers whose blocks are a power of two, from 16 on; larger ones bring nothing.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a quantised matrix as graphs hold it: dtype, shape, and what makes its bytes when it is written.

    label: its name in files, where that of the part would be another's.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[npt.NDArray[Any]]]
    label: str = ""

    @property
    def nbytes(self) -> int:
        """Its size; two 4-bit integers share a byte."""
        size = math.prod(self.shape)
        return size // 2 if self.dtype == "int4" else size * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class IntegerMatrix(CheckpointTensor):
    """A matrix [out, in] of integers; each subclass knows how one kind of writer packs them."""

    parts: dict[str, CheckpointTensor]  # tensors by the last word of their names
    bits: int  # of an integer, 4 or 8
    group: int  # so many integers along the input share a scale and a zero point
    # int64 [in], the inputs in the order in which groups follow each other; None where they do so as they are
    order: npt.NDArray[np.int64] | None
    symmetric: bool = False  # whether all zero points are 0

    @property
    def format(self) -> WeightFormat:
        """Bits and block size for DequantizeLinear: a group, or equal parts of it."""
        return WeightFormat(self.bits, math.gcd(self.group, _LARGEST_BLOCK))

    @property
    def by_row(self) -> bool:
        """Whether TensorRT gets a scale for each output: it documents blocks of 4-bit integers alone."""
        return self.bits == 8 and self.group == self.shape[1]

    def packed(self) -> Iterator[Bytes]:
        """The integers as bytes [in, out * bits / 8]; with 4 bits the even column is a byte's low half.

        Yields: parts of them, 1-D, each valid until the next but one.
        """
        raise NotImplementedError

    def grouped(self) -> Bytes:
        """All of them, [in, out * bits / 8], inputs in the order of their groups."""
        rows, columns = self.shape
        octets, filled = np.empty((columns, rows * self.bits // 8), np.uint8), 0
        for part in self.packed():
            octets.reshape(-1)[filled : filled + len(part)] = part
            filled += len(part)
        return octets if self.order is None else octets[self.order]

    def scales(self) -> npt.NDArray[Any]:
        """[in / block_size, out], in the file's dtype."""
        return self._by_block(self.parts["scales"].array())

    def zero_points(self) -> Bytes | None:
        """Zero points [in / block_size, out] packed as the integers are; None where all are 0."""
        raise NotImplementedError

    def shift(self) -> npt.NDArray[np.float32]:
        """What the zero points do to a product: -block_size z s, to multiply each block's mean input by."""
        zeros = self.zero_points()
        assert zeros is not None  # only who has zero points needs this
        return _unpacked(zeros, self.bits) * (-self.format.block_size * self.scales().astype(np.float32))

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The dequantised matrix, a few rows at a time: float32, exact, not yet rounded to the scales' dtype."""
        rows, columns = self.shape
        size = self.format.block_size
        integers = _unpacked(self.grouped(), self.bits).reshape(columns // size, size, rows)
        zeros, scales = self.zero_points(), self.scales().astype(np.float32)[:, None]
        offsets = np.int8(0) if zeros is None else _unpacked(zeros, self.bits)[:, None]
        step = max(1, _CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            some = np.s_[..., first : first + step]
            differences = integers[some].astype(np.float32) - offsets[some if zeros is not None else ()]
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite in the file stays so
                by_group = (differences * scales[some]).reshape(columns, -1).T
            floats = np.empty(by_group.shape, np.float32)
            floats[:, slice(None) if self.order is None else self.order] = by_group
            yield floats.reshape(-1)

    def parts_in_graph(self, dtype: str, target: str) -> dict[str, Part]:
        """By their names in weights.QuantisedMatrix. dtype: of the scales; TensorRT takes a shift for zero points."""
        (rows, columns), element, where = self.shape, f"int{self.bits}", f"{self.file}: tensor {self.name}"
        blocks, order = (columns // self.format.block_size, rows), self.order
        parts = {
            "values": Part(element, (columns, rows), self.packed if order is None else lambda: iter([self.grouped()])),
            "scales": _rounded(self.scales, dtype, blocks, f"{where}: a scale"),
        }
        if self.by_row and target not in (CPU, CUDA):
            by_row = _rounded(lambda: self.scales()[0], dtype, (rows,), f"{where}: a scale")
            parts["scales"] = replace(by_row, label="row_scales")
        if order is not None:
            parts["order"] = Part("int64", (columns,), lambda: iter([order]))
        if not self.symmetric and target in (CPU, CUDA):
            parts["zero_points"] = Part(element, blocks, self._zero_point_blocks)
        elif not self.symmetric:
            parts["shift"] = _rounded(self.shift, dtype, blocks, f"{where}: zero point x scale")
        return parts

    def _zero_point_blocks(self) -> Iterator[Bytes]:
        zeros = self.zero_points()
        assert zeros is not None  # as above
        yield zeros.reshape(-1)

    def _by_block(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What there is of each group, [in / group, ..], for each block."""
        return np.repeat(rows, self.group // self.format.block_size, axis=0)

    def _zeros(self, packed: Bytes) -> Bytes | None:
        return self._by_block(packed) if packed.any() else None


class AwqMatrix(IntegerMatrix):
    """AutoAWQ's gemm packing: int32 [in, out / 8], columns 0 2 4 6 1 3 5 7 of eight from the low bits upwards."""

    def packed(self) -> Iterator[Bytes]:
        return (_awq_order(block) for block in self.parts["qweight"].blocks())

    def zero_points(self) -> Bytes | None:
        zeros = self.parts["qzeros"]
        return self._zeros(_awq_order(zeros.array()).reshape(zeros.shape[0], -1))


class GptqMatrix(IntegerMatrix):
    """GPTQ's packing: int32 [in * bits / 32, out] of consecutive rows, zero points of consecutive columns."""

    def packed(self) -> Iterator[Bytes]:
        tensor, columns = self.parts["qweight"], self.shape[0]
        buffers = alternating_buffers(math.prod(tensor.shape), np.dtype(np.int32), columns)
        sign = np.uint32(int(_sign_bits(self.bits)) * 0x01010101)
        for words, buffer in zip(tensor.stored(columns), buffers, strict=False):
            for some in _cached(words.view(np.uint32)):
                if self.bits == 4:  # of every two columns, the even rows to the one's bytes and the odd to the other's
                    _exchange(some.view(np.uint64), some.view(np.uint64), 28, 0xF0F0F0F0)
                some ^= sign
            shape, order = ((-1, columns, 4), (0, 2, 1)) if self.bits == 8 else ((-1, columns // 2, 2, 4), (0, 3, 2, 1))
            by_row = words.view(np.uint8).reshape(shape).transpose(order)
            octets: Bytes = buffer[: words.size].view(np.uint8)
            np.copyto(octets.reshape(by_row.shape), by_row)
            yield octets

    def zero_points(self) -> Bytes | None:
        zeros = self.parts["qzeros"].array().view(np.uint8)
        return self._zeros(self._counted(zeros) ^ _sign_bits(self.bits))

    def _counted(self, zeros: Bytes) -> Bytes:
        """The zero points from what is stored: the first version of the format stores them less one."""
        one, low, half = np.uint8(1), np.uint8(0xF), np.uint8(4)
        counted: Bytes = zeros + one if self.bits == 8 else (zeros & low) + one & low | (zeros >> half) + one << half
        return counted


class GptqV2Matrix(GptqMatrix):
    """GPTQ's second version: zero points as they are."""

    def _counted(self, zeros: Bytes) -> Bytes:
        return zeros


class PackedMatrix(IntegerMatrix):
    """compressed-tensors' pack-quantized: int32 [out, in * bits / 32] of consecutive columns, or int8 [out, in]."""

    def packed(self) -> Iterator[Bytes]:
        name = "weight_packed" if "weight_packed" in self.parts else "weight"
        tensor, count, first = self.parts[name], 8 // self.bits, 0
        rows, columns = self.shape
        turned = np.empty((columns // count, count, rows // count), np.uint8)
        size = _TILE_ROWS * tensor.shape[1]
        for block in tensor.stored(size):
            for tile in (block[start : start + size] for start in range(0, len(block), size)):
                if self.bits == 4:  # of every two rows, the even columns to the one's bytes and the odd to the other's
                    pairs = tile.view(np.uint64).reshape(-1, 2, columns // 16)
                    _exchange(pairs[:, 1], pairs[:, 0], 4, 0x0F0F0F0F0F0F0F0F)
                octets = tile.view(np.uint8).reshape(-1, count, columns // count).transpose(2, 1, 0)
                turned[..., first : first + octets.shape[2]] = octets
                first += octets.shape[2]
        if name == "weight_packed":
            turned ^= _sign_bits(self.bits)
        yield turned.reshape(-1)

    def scales(self) -> npt.NDArray[Any]:
        scales = self.parts["weight_scale"].array()
        by_group = np.broadcast_to(scales.reshape(-1, 1) if scales.size == 1 else scales, self._groups)
        return self._by_block(np.ascontiguousarray(by_group.T))

    def zero_points(self) -> Bytes | None:
        if "weight_zero_point" not in self.parts:
            return None
        zeros = self.parts["weight_zero_point"].array()
        if zeros.dtype == np.int8:
            signed = np.broadcast_to(zeros.reshape(-1, 1) if zeros.size == 1 else zeros, self._groups).T
            octets: Bytes = np.ascontiguousarray(signed).view(np.uint8)
            if self.bits == 4:
                octets = (octets[:, 0::2] & np.uint8(0xF)) | (octets[:, 1::2] << np.uint8(4))
            return self._zeros(octets)
        octets = np.ascontiguousarray(zeros.T).view(np.uint8)  # [groups, out * bits / 8]: packed along the output
        return self._zeros(octets[:, : self.shape[0] * self.bits // 8] ^ _sign_bits(self.bits))

    @property
    def _groups(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1] // self.group


@dataclass(frozen=True, slots=True)
class Float8Matrix(CheckpointTensor):
    """A matrix [out, in] of float8_e4m3fn with a scale for the tensor, each row, or each block."""

    values: CheckpointTensor  # the float8 tensor
    scale: CheckpointTensor  # [], [1], [out, 1] or [out / block, in / block] rounded up
    input_scale: CheckpointTensor | None  # of the activations, where they were calibrated
    # rows and columns that share a scale, the last of them maybe fewer; (0, 0) where a scale is of the tensor or of a
    # row
    block: tuple[int, int]

    @property
    def block_size(self) -> int:
        """Columns that share a scale in graphs, where all blocks are equal; 0 without blocks."""
        return math.gcd(self.shape[1], self.block[1]) if self.block[1] else 0

    def scales(self) -> npt.NDArray[Any]:
        """[], [out], or with blocks [out, in / block_size], in the file's dtype."""
        scales = self.scale.array()
        if self.block[1]:
            by_row = np.repeat(scales, self.block[0], axis=0)[: self.shape[0]]
            return np.repeat(by_row, self.block[1] // self.block_size, axis=1)[:, : self.shape[1] // self.block_size]
        return scales.reshape(()) if scales.size == 1 else scales.reshape(-1)

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The dequantised matrix, float32, a few rows at a time."""
        rows, columns = self.shape
        values, scales = self.values.array(), self.scales().astype(np.float32)
        step = max(1, _CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            scale = scales[first : first + step] if scales.ndim else scales
            scale = np.repeat(scale, self.block_size, axis=1) if self.block_size else scale[..., None]
            with np.errstate(over="ignore", invalid="ignore"):
                floats = values[first : first + step].astype(np.float32) * scale
            yield floats.reshape(-1)

    def scales_dtype(self, dtype: str) -> str:
        """Dtype of the scales in a graph of another: theirs, so that they keep their precision."""
        return dtype if self.scale.dtype == dtype else "float32"

    def parts_in_graph(self, dtype: str) -> dict[str, Part]:
        """By their names in weights.QuantisedMatrix, in the order of the file's rows. dtype: of the model."""
        where = f"{self.file}: tensor {self.name}"
        parts = {
            "values": Part("float8_e4m3fn", self.shape, self.values.blocks),
            "scales": _rounded(self.scales, self.scales_dtype(dtype), self.scales().shape, f"{where}: a scale"),
        }
        if self.input_scale is not None:
            parts["input_scale"] = _rounded(self.input_scale.array, dtype, (), f"{where}: input_scale")
        return parts


def check_groups(matrix: IntegerMatrix) -> IntegerMatrix:
    """The matrix, if its groups can be blocks of DequantizeLinear; else a CheckpointError."""
    rows, columns = matrix.shape
    if columns % matrix.group or matrix.format.block_size < _SMALLEST_BLOCK or rows % 8:
        raise CheckpointError(
            f"{matrix.file}: tensor {matrix.name}: groups of {matrix.group} in a matrix of {rows} x {columns}, "
            f"expected groups that divide the inputs, of a multiple of {_SMALLEST_BLOCK}, and a multiple of 8 outputs"
        )
    return matrix


def _rounded(make: Callable[[], npt.NDArray[Any]], dtype: str, shape: tuple[int, ...], what: str) -> Part:
    """A small table of floats in a dtype; a value that becomes infinite, or is no number, is refused as it is made."""

    def rounded() -> Iterator[npt.NDArray[Any]]:
        with np.errstate(over="ignore"):
            values = make().astype(numpy_dtype(dtype), copy=False).reshape(-1)
        if not_finite(values):
            advice = "Export with --dtype bfloat16 or float32"
            raise CheckpointError(f"{what}: infinite, or too large for {dtype}. {advice}")
        yield values

    return Part(dtype, shape, rounded)


def _sign_bits(bits: int) -> np.uint8:
    """What turns integers that count from 0 into signed ones, as bytes: the highest bit of each."""
    highest: np.uint8 = np.uint8(0x88 if bits == 4 else 0x80)
    return highest


def _unpacked(octets: Bytes, bits: int) -> npt.NDArray[np.int8]:
    """Signed integers of packed bytes [.., columns * bits / 8]."""
    if bits == 8:
        return octets.view(np.int8)
    signed = np.empty((*octets.shape, 2), np.int8)
    signed[..., 0] = (octets << 4).view(np.int8) >> 4
    signed[..., 1] = octets.view(np.int8) >> 4
    return signed.reshape(*octets.shape[:-1], -1)


def _exchange(words: npt.NDArray[Any], others: npt.NDArray[Any], distance: int, mask: int) -> None:
    """In place, the bits of words under a mask change places with those of others, so many bits above the mask."""
    different = others >> words.dtype.type(distance)
    different ^= words
    different &= words.dtype.type(mask)
    words ^= different
    different <<= words.dtype.type(distance)
    others ^= different


def _cached(words: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """A 1-D array in parts that stay in the CPU's cache."""
    size = _CACHED_BYTES // words.itemsize
    return (words[first : first + size] for first in range(0, len(words), size))


def _awq_order(words: npt.NDArray[Any]) -> Bytes:
    """Signed 4-bit integers in the order of their columns, of int32 words in AWQ's, in the same memory."""
    for some in _cached(words.reshape(-1).view(np.uint32)):
        _exchange(some, some, 12, 0x0000F0F0)  # columns 0 2 4 6 1 3 5 7 become 0 1 4 5 2 3 6 7
        _exchange(some, some, 8, 0x0000FF00)
        some ^= np.uint32(0x88888888)
    ordered: Bytes = words.view(np.uint8)
    return ordered
