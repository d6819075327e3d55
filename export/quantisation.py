"""Quantised weights: a float matrix becomes small integers and a scale for each block along its input.

In: a matrix [out, in] of a checkpoint. Out: integers [in, out], two 4-bit ones a byte, and scales [in / block, out],
as a blocked DequantizeLinear on axis 0 reads them:

    w ~= integer * scale of its block       integers from -8 to 7, or -128 to 127; scale > 0

Symmetric, without zero points, since TensorRT takes no others. ONNX Runtime multiplies by the integers themselves only
where the blocks run along axis 0, hence the turned layout.
What stays in floating point: norms, biases, convolutions, the embedding table, the vision tower, what makes a linear
layer's decay, and the scoring layer's query and key projections, which make the scores. So a bundle of quantised
weights keeps the same tokens as one of floats, but for a hybrid model, whose layers before that one are quantised.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import WeightFormat, numpy_dtype
from hawk_trt.errors import CheckpointError

from .tensor_file import CheckpointTensor

WEIGHT_BITS = (4, 8)
BLOCK_SIZES = (32, 64, 128)
# In place of a block size: a row of 8-bit integers shares a scale, which is what TensorRT documents of them. ONNX
# Runtime multiplies by blocks alone, and gets that scale once for each of so many integers at most.
WHOLE_ROW, _MOST_IN_BLOCK, _LEAST_IN_BLOCK = 0, 128, 16
# DequantizeLinear takes blocks and 4-bit integers from here on.
QUANTISED_OPSET = 21
# Scales in half precision from here on.
ROW_SCALES_OPSET = 19
_LANGUAGE = ("language_model.", "lm_head.")
# A row for each head of a linear layer: what it forgets and what it takes in.
_DECAY = (".linear_attn.in_proj_a.weight", ".linear_attn.in_proj_b.weight")
# Scales that are tried: the largest magnitude of a block becomes so many steps. Eight suits a normal distribution best,
# though its positive end is then clipped; the others win where a block has an outlier or none.
_STEPS = {4: (7.0, 8.0, 9.0), 8: (127.0,)}
# Quantised at a time: the temporary arrays stay in the CPU's cache.
_CHUNK_ELEMENTS = 1 << 16
_ALIGNMENT = 64


def may_be_quantised(name: str, shape: tuple[int, ...], scoring_layer: int = 0) -> bool:
    """Whether a matrix [out, in] can be other than floats: the language model's, but for those of scores and decay."""
    scoring = tuple(f"language_model.layers.{scoring_layer}.self_attn.{letter}_proj." for letter in "qk")
    floats = name.startswith(scoring) or name.endswith(_DECAY)
    return len(shape) == 2 and name.startswith(_LANGUAGE) and not floats


def fits_blocks(shape: tuple[int, ...], weights: WeightFormat) -> bool:
    """Whether whole blocks fill a matrix [out, in]."""
    block = block_size(shape[1], weights)
    return block >= _LEAST_IN_BLOCK and shape[1] % block == 0 and shape[0] % 2 == 0


def block_size(columns: int, weights: WeightFormat) -> int:
    """Integers of a row that share a scale in ONNX Runtime."""
    return weights.block_size or math.gcd(columns, _MOST_IN_BLOCK)


def layout(shape: tuple[int, int], weights: WeightFormat, dtype: str) -> tuple[int, int, int]:
    """Bytes of the integers, offset of the scales behind their start, and bytes of the scales."""
    integers = math.prod(shape) * weights.bits // 8
    scales = math.prod(shape) // block_size(shape[1], weights) * numpy_dtype(dtype).itemsize
    return integers, -(-integers // _ALIGNMENT) * _ALIGNMENT, scales


def quantise(
    tensor: CheckpointTensor, weights: WeightFormat, dtype: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Quantise a matrix [out, in]; nothing but the result is held in memory.

    out is even, in a multiple of the block size.  dtype: of the scales.

    Returns:
        The integers' bytes, uint8 [in, out * bits / 8], the even column in a byte's low half; and the scales,
        [in / block_size, out].

    Raises:
        CheckpointError: a value that is infinite or NaN, or a scale too large for the dtype.
    """
    rows, columns = tensor.shape
    packed = np.empty((columns, rows * weights.bits // 8), np.uint8)
    scales = np.empty((columns // block_size(columns, weights), rows), numpy_dtype(dtype))
    first = 0
    for chunk in _row_chunks(tensor):
        last = first + len(chunk)
        integers, scale = _quantised(chunk, weights, dtype)
        if not np.isfinite(scale.astype(np.float32)).all():
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: it holds an infinite value, NaN, or one too large for scales in "
                f"{dtype}, so it cannot be quantised. Export with --dtype bfloat16 or float32"
            )
        packed[:, first * weights.bits // 8 : last * weights.bits // 8] = _packed(integers, weights.bits).T
        scales[:, first:last] = scale.T
        first = last
    return packed, scales


def _row_chunks(tensor: CheckpointTensor) -> Iterator[npt.NDArray[np.float32]]:
    """The matrix an even number of rows at a time, float32 [some, in], each valid until the next."""
    columns = tensor.shape[1]
    chunk = np.empty((max(2, _CHUNK_ELEMENTS // columns // 2 * 2), columns), np.float32)
    flat, filled = chunk.reshape(-1), 0
    for block in tensor.blocks():
        left = block
        while len(left):
            count = min(len(left), flat.size - filled)
            flat[filled : filled + count] = left[:count]
            filled, left = filled + count, left[count:]
            if filled == flat.size:
                yield chunk
                filled = 0
    if filled:
        yield chunk[: filled // columns]


def _quantised(
    rows: npt.NDArray[np.float32], weights: WeightFormat, dtype: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.floating]]:
    """Integers [rows, in], and of the scales tried [rows, in / block_size] those with the least squared error."""
    blocks = rows.reshape(len(rows), -1, weights.block_size or rows.shape[1])
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        tried = np.stack([(largest / np.float32(steps)).astype(numpy_dtype(dtype)) for steps in _STEPS[weights.bits]])
        tried[tried == 0] = 1  # a block of zeros
        scale = tried[0]
        if len(tried) > 1:
            errors = [_rounded(blocks, each, weights.bits) * each.astype(np.float32) - blocks for each in tried]
            squares = np.stack([np.square(error, out=error).sum(axis=-1, keepdims=True) for error in errors])
            scale = np.take_along_axis(tried, squares.argmin(axis=0)[None], axis=0)[0]
        integers = _rounded(blocks, scale, weights.bits).astype(np.int8)
    return integers.reshape(rows.shape), scale[..., 0]


def _rounded(blocks: npt.NDArray[np.float32], scale: npt.NDArray[np.floating], bits: int) -> npt.NDArray[np.float32]:
    """The integers nearest to blocks / scale, as floats."""
    steps = blocks / scale.astype(np.float32)
    np.rint(steps, out=steps)
    return steps.clip(-(1 << bits - 1), (1 << bits - 1) - 1)


def _packed(integers: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Integers [rows, in] as bytes [rows * bits / 8, in]: with 4 bits, an even row in the low half, the next above."""
    octets: npt.NDArray[np.uint8] = integers.view(np.uint8)
    if bits == 4:
        octets = (octets[0::2] & np.uint8(0xF)) | (octets[1::2] << np.uint8(4))
    return octets
