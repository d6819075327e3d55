"""The quantised formats that are read: what config.json says of them, and which tensors make a matrix.

    awq                 AutoAWQ's gemm packing, int4 with zero points
    gptq                int4 and int8, symmetric or not, both versions of the format
    compressed-tensors  pack-quantized int4 and int8, int-quantized int8, float-quantized FP8
    fp8                 FP8 with a scale for each block (Qwen's), row or tensor
    modelopt            FP8 with calibrated scales; the settings may lie in hf_quant_config.json alone

A matrix says by its own parts how it is packed, so that models of mixed precision are read as well.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import WeightFormat
from hawk_trt.errors import CheckpointError
from hawk_trt.stages import TENSORRT

from .checkpoint_files import CONFIG, read_json
from .quantisation import WHOLE_ROW
from .stored import AwqMatrix, Float8Matrix, GptqMatrix, GptqV2Matrix, IntegerMatrix, PackedMatrix, check_groups
from .tensor_file import CheckpointTensor

MODELOPT = "hf_quant_config.json"
_KEYS = ("quantization_config", "compression_config")
_LANGUAGE_CONFIGS = ("text_config", "llm_config")
READ = "awq, gptq, compressed-tensors (int4, int8, FP8), fp8 or modelopt FP8"
_INSTEAD = f"Take the checkpoint that it was made from, or one of {READ}"
# What writers call the parts of a matrix; the rest of the name is the matrix's.
_INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_FLOAT8_PARTS = ("weight_scale_inv", "input_scale", "activation_scale")
_PART = re.compile(rf"(.+)\.({'|'.join((*_INTEGER_PARTS, *_PACKED_PARTS, *_FLOAT8_PARTS))})")
# Of a quantised KV cache, of outputs, and of activations of integers: nothing here reads them.
_LEFT_OUT = re.compile(r"\.((k|v|q|kv)_(scale|zero_point)|prob_scale|(input|output)_zero_point|output_scale)$")
# Parts of formats that are not read: bitsandbytes', NVFP4's.
_FOREIGN = re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.\w+|weight_global_scale|weight_scale_2)$")
PLAIN = ("float64", "float32", "float16", "bfloat16")
# Settings of each method: the value that can be read, by its key.
_EXPECTED: dict[str, tuple[tuple[str, tuple[object, ...]], ...]] = {
    "awq": (("version", ("gemm", None)), ("bits", (4, None)), ("w_bit", (4, None))),
    "gptq": (("bits", (4, 8)), ("checkpoint_format", ("gptq", "gptq_v2", None)), ("format", ("gptq", "gptq_v2", None))),
    "compressed-tensors": (
        ("format", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")),
        ("transform_config", (None,)),
    ),
    "fp8": (("fmt", ("e4m3", None)),),
    "modelopt": (("quant_algo", ("fp8", "fp8_pb_wo", "fp8_per_channel_per_token")),),
}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised."""

    method: str  # awq, gptq, compressed-tensors, fp8 or modelopt
    weights: WeightFormat | None  # bits and block size of most of its integers, None where there are none
    told: str  # method, formats and numbers of matrices, and what is not quantised: a line to read
    scales: frozenset[str]  # dtypes of the integers' scales
    float8: bool  # whether there are matrices of FP8

    def notes(self, dtype: str, targets: Sequence[str]) -> list[str]:
        """What becomes of the weights in a dtype and for targets, where it is not what the file holds."""
        notes = []
        rounded = sorted(self.scales - {dtype}) if dtype != "float32" else []
        if rounded:
            notes.append(
                f"the scales of its integers are {', '.join(rounded)} and get rounded to {dtype}; --dtype {rounded[0]} "
                "keeps them as they are"
            )
        others = [target for target in targets if target != TENSORRT]
        if self.float8 and others:
            notes.append(
                f"FP8 weights stay so for the target {TENSORRT} alone; {', '.join(others)} get them in {dtype}"
            )
        return notes


def quantisation_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of its quantisation, None where it says nothing."""
    places = [source for source in (config, *map(config.get, _LANGUAGE_CONFIGS)) if isinstance(source, Mapping)]
    for settings in (source.get(key) for key in _KEYS for source in places):
        if settings:
            return dict(settings) if isinstance(settings, Mapping) else {"quant_method": str(settings)}
    if (folder / MODELOPT).is_file():
        settings = read_json(folder / MODELOPT).get("quantization")
        return {**(settings if isinstance(settings, Mapping) else {}), "quant_method": "modelopt"}
    return None


def method_of(settings: Mapping[str, Any]) -> str:
    """The quant_method as it is named here."""
    method = str(settings.get("quant_method", settings.get("quant_type", "unnamed")))
    return "compressed-tensors" if "config_groups" in settings and method == "unnamed" else method


def read_matrices(
    tensors: dict[str, CheckpointTensor], settings: Mapping[str, Any] | None
) -> tuple[dict[str, CheckpointTensor], Quantisation | None]:
    """Put the parts of quantised matrices together.

    tensors: of the checkpoint, by canonical name.  settings: see quantisation_settings.

    Returns:
        All tensors, a quantised matrix as one; and what was found, None where all are plain.

    Raises:
        CheckpointError: a format, or a setting of one, that is not read; a part that is missing or does not fit.
    """
    parts: dict[str, dict[str, CheckpointTensor]] = defaultdict(dict)
    plain: dict[str, CheckpointTensor] = {}
    for name, tensor in tensors.items():
        if _LEFT_OUT.search(name):
            continue
        if match := _PART.fullmatch(name):
            parts[match[1]][match[2]] = tensor
        else:
            plain[name] = tensor
    for name, tensor in list(plain.items()):
        if tensor.dtype not in PLAIN and name.endswith(".weight"):
            parts[name.removesuffix(".weight")]["weight"] = plain.pop(name)
    odd = [tensor for name, tensor in plain.items() if tensor.dtype not in PLAIN or _FOREIGN.search(name)]
    if not parts and not odd:
        return plain, None
    if settings is None:
        tensor = [*odd, *(tensor for found in parts.values() for tensor in found.values())][0]
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: part of quantised weights ({tensor.dtype}), yet neither {CONFIG} "
            f"nor {MODELOPT} says how they were quantised. {_INSTEAD}"
        )
    method = checked_method(settings)
    if odd:
        raise CheckpointError(
            f"{odd[0].file}: tensor {odd[0].name}: {odd[0].dtype}, no part of a matrix of {method}. {_INSTEAD}"
        )
    matrices: dict[str, CheckpointTensor] = {}
    for name, found in parts.items():
        first = next(iter(found.values()))
        try:
            matrices[f"{name}.weight"] = _matrix(f"{name}.weight", found, method, settings)
        except KeyError as error:
            raise CheckpointError(
                f"{first.file}: {name}: no tensor {error.args[0]} beside {', '.join(found)}"
            ) from error
    twice = matrices.keys() & plain.keys()
    if twice:
        raise CheckpointError(f"{min(twice)}: given twice, as floats and quantised")
    return plain | matrices, _found(method, matrices, plain)


def checked_method(settings: Mapping[str, Any]) -> str:
    """The method, if it and its settings can be read; else a CheckpointError."""
    method = method_of(settings)
    if method not in _EXPECTED:
        raise CheckpointError(f"{CONFIG}: weights quantised with {method} cannot be exported. {_INSTEAD}")
    for key, allowed in _EXPECTED[method]:
        got = settings.get(key) or None
        if (got.lower() if isinstance(got, str) else got) not in allowed:
            names = ", ".join(str(value) for value in allowed if value is not None) or "nothing"
            raise CheckpointError(
                f"{CONFIG}: weights quantised with {method}: {key}: got {str(got)[:80]}, expected {names}. {_INSTEAD}"
            )
    return method


def _matrix(
    name: str, parts: dict[str, CheckpointTensor], method: str, settings: Mapping[str, Any]
) -> IntegerMatrix | Float8Matrix:
    first = next(iter(parts.values()))
    if method in ("awq", "gptq"):
        words, scales = parts["qweight"], parts["scales"]
        _expect_dims(words, "int32", 2)
        if method == "awq":
            cls: type[IntegerMatrix] = AwqMatrix
            bits, columns, rows = 4, words.shape[0], words.shape[1] * 8
        else:
            second = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
            cls = GptqV2Matrix if second else GptqMatrix
            rows, zeros = words.shape[1], parts["qzeros"]
            bits = zeros.shape[-1] * 32 // rows  # settings of single matrices (dynamic) may differ
            if bits not in (4, 8):
                raise CheckpointError(f"{words.file}: {name}: {bits} bits in qzeros, expected 4 or 8. {_INSTEAD}")
            columns = words.shape[0] * 32 // bits
        groups = scales.shape[0] if len(scales.shape) == 2 else 0
        _expect(scales, (groups, rows))
        _expect(parts["qzeros"], (groups, rows * bits // 32))
    elif "weight_packed" in parts or first.dtype == "int8" or parts.get("weight", first).dtype == "int8":
        cls, words = PackedMatrix, parts.get("weight_packed") or parts["weight"]
        _expect_dims(words, "int32" if "weight_packed" in parts else "int8", 2)
        rows, columns = words.shape
        bits = 8
        if "weight_packed" in parts:
            _expect(parts["weight_shape"], (2,))
            rows, columns = (int(size) for size in parts["weight_shape"].array())
            bits = words.shape[1] * 32 // max(columns, 1)
            if bits not in (4, 8) or words.shape != (rows, columns * bits // 32):
                raise CheckpointError(
                    f"{words.file}: {name}: {bits} bits in {list(words.shape)} for {rows} x {columns}, "
                    f"expected 4 or 8. {_INSTEAD}"
                )
        groups = parts["weight_scale"].shape[1] if len(parts["weight_scale"].shape) == 2 else 1
        for part in (part for part in ("weight_scale", "weight_zero_point") if part in parts):
            packed = parts[part].dtype == "int32"
            parts[part] = _of_groups(parts[part], -(-rows * bits // 32) if packed else rows, groups)
        scales = parts["weight_scale"]
    else:
        return _float8(name, parts)
    if not groups or columns % groups:
        raise CheckpointError(f"{scales.file}: {name}: {groups} groups of scales for {columns} inputs")
    group, shape = columns // groups, (rows, columns)
    order = _order(parts.get("g_idx") or parts.get("weight_g_idx"), columns, group)
    matrix = check_groups(cls(name, words.file, 0, rows * columns * 4, "float32", shape, parts, bits, group, order))
    return replace(matrix, symmetric=matrix.zero_points() is None)


def _order(tensor: CheckpointTensor | None, columns: int, group: int) -> npt.NDArray[np.int64] | None:
    """The inputs in the order of their groups (desc_act, actorder), None where they lie so.

    tensor: the group of each input.
    """
    ascending = np.arange(columns) // group
    if tensor is None:
        return None
    group_of = tensor.array()
    if np.array_equal(group_of, ascending) or not group_of.any():  # zeros are a placeholder of some writers
        return None
    order = np.argsort(group_of, kind="stable")
    if len(group_of) != columns or not np.array_equal(group_of[order], ascending):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: expected {group} inputs in every group. Take a checkpoint that was "
            "quantised without desc_act or actorder"
        )
    return order


def _float8(name: str, parts: dict[str, CheckpointTensor]) -> Float8Matrix:
    values = parts["weight"]
    _expect_dims(values, "float8_e4m3fn", 2)
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    if len(scale.shape) == 4:  # ModelOpt's blocks: [rows, 1, columns, 1]
        scale = replace(scale, shape=scale.shape[::2])
    rows, columns = values.shape
    block = (0, 0)
    if len(scale.shape) == 2 and scale.shape != (rows, 1) and scale.shape != (1, 1):
        block = (_block(rows, scale.shape[0]), _block(columns, scale.shape[1]))
        if not all(block):
            raise CheckpointError(
                f"{scale.file}: {name}: scales {list(scale.shape)} for a matrix of {rows} x {columns}, "
                "expected one for each block of 128 x 128, each row, or all"
            )
    elif math.prod(scale.shape) not in (1, rows):
        raise CheckpointError(f"{scale.file}: {name}: scales {list(scale.shape)} for a matrix of {rows} x {columns}")
    static = parts.get("input_scale") or parts.get("activation_scale")
    if static is not None and math.prod(static.shape) != 1:
        raise CheckpointError(f"{static.file}: {name}: input_scale: got {list(static.shape)}, expected one number")
    return Float8Matrix(name, values.file, 0, rows * columns * 4, "float32", values.shape, values, scale, static, block)


def _block(size: int, count: int) -> int:
    """The power of two that cuts size into count parts, the last of which may be smaller; 0 where none does."""
    return next((block for block in (128, 64, 32, 256, 512) if -(-size // block) == count), 0)


def _expect_dims(tensor: CheckpointTensor, dtype: str, dims: int) -> None:
    if tensor.dtype != dtype or len(tensor.shape) != dims:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: got {tensor.dtype}{list(tensor.shape)}, expected {dtype} of {dims} "
            f"dimensions. {_INSTEAD}"
        )


def _expect(tensor: CheckpointTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: shape {list(tensor.shape)}, its integers ask for {list(shape)}"
        )


def _of_groups(tensor: CheckpointTensor, rows: int, groups: int) -> CheckpointTensor:
    """Scales or zero points [rows, groups], or a single one; those of whole rows may lack the second dimension."""
    if tensor.shape == (rows,):
        tensor = replace(tensor, shape=(rows, 1))
    if math.prod(tensor.shape) != 1:
        _expect(tensor, (rows, groups))
    return tensor


def _found(
    method: str, matrices: Mapping[str, CheckpointTensor], plain: Mapping[str, CheckpointTensor]
) -> Quantisation:
    kinds = Counter(_kind(matrix) for matrix in matrices.values())
    integers = [matrix for matrix in matrices.values() if isinstance(matrix, IntegerMatrix)]
    formats = Counter(WeightFormat(8, WHOLE_ROW) if matrix.by_row else matrix.format for matrix in integers)
    # TensorRT takes no blocks of 8-bit integers: where there are any, they count
    blocks = [found for found in formats if found.bits == 8 and found.block_size]
    counted = [*blocks, *(found for found, _ in formats.most_common(1))]
    told = ", ".join(f"{count} matrices {kind}" for kind, count in kinds.most_common())
    left = Counter(
        "the vision tower" if name.startswith("visual.") else re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        for name, tensor in plain.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and "embed" not in name
    )
    rest = f"; not quantised: {', '.join(list(left)[:6])}" if left else ""
    scales = {
        tensor.dtype
        for matrix in matrices.values()
        if isinstance(matrix, IntegerMatrix)
        for part, tensor in matrix.parts.items()
        if part in ("scales", "weight_scale")
    }
    return Quantisation(
        method,
        counted[0] if counted else None,
        f"{method}, {told}{rest}",
        frozenset(scales),
        any(isinstance(matrix, Float8Matrix) for matrix in matrices.values()),
    )


def _kind(matrix: CheckpointTensor) -> str:
    if isinstance(matrix, IntegerMatrix):
        groups = "a scale a row" if matrix.group == matrix.shape[1] else f"groups of {matrix.group}"
        zeros = "" if matrix.symmetric else " and zero points"
        return f"int{matrix.bits} with {groups}{zeros}"
    assert isinstance(matrix, Float8Matrix)
    scale = matrix.scales().ndim
    scales = ("a scale", "a scale a row", f"blocks of {matrix.block[0]} x {matrix.block[1]}")[scale]
    return f"FP8 with {scales}{', static activations' if matrix.input_scale else ''}"
