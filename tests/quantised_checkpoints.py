"""Checkpoints as the quantising packages write them, made here from their published layouts.

tests/export/test_quantisers.py holds these writers against the packages themselves, where they are installed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoints import HUB, Sizes, config, make_checkpoint, named, random_tensors, write_json, write_safetensors

Array = npt.NDArray[Any]
SMALL = Sizes(intermediate_size=128)
FLOAT8 = ml_dtypes.float8_e4m3fn
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Written:
    """The parts of a matrix by the end of their names, and the float32 [out, in] that they stand for."""

    parts: dict[str, Array]
    floats: Array


@dataclass(frozen=True)
class Writer:
    """What writes a matrix [out, in], and what config.json says of it."""

    write: Callable[[Array], Written]
    settings: dict[str, Any]


def integers(matrix: Array, bits: int, group: int, *, symmetric: bool, scales: Any = np.float16) -> tuple[Array, ...]:
    """Round a matrix [out, in]: q [out, in] and z [out, groups] that count from 0, s [out, groups]; and its floats."""
    blocks = matrix.astype(np.float32).reshape(len(matrix), -1, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = np.abs(blocks).max(-1) / (top // 2)
        zero = np.full(scale.shape, (top + 1) // 2)
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scale = (high - low) / top
        zero = np.rint(-low / scale).clip(0, top).astype(int)
    scale = scale.astype(scales)
    q = (np.rint(blocks / scale.astype(np.float32)[..., None]) + zero[..., None]).clip(0, top).astype(int)
    floats = (q - zero[..., None]).astype(np.float32) * scale.astype(np.float32)[..., None]
    return q.reshape(matrix.shape), zero, scale, floats.reshape(matrix.shape)


def pack(values: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """Values that count from 0, 32 / bits of them along an axis in one int32, the first in the low bits."""
    values = np.moveaxis(values, axis, -1).astype(np.uint64)
    count = 32 // bits
    words = values.reshape(*values.shape[:-1], -1, count)[..., list(order or range(count))]
    packed = (words << (np.arange(count, dtype=np.uint64) * np.uint64(bits))).sum(-1, dtype=np.uint64)
    return np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis))


def awq(group: int) -> Writer:
    def write(matrix: Array) -> Written:
        q, z, s, floats = integers(matrix, 4, group, symmetric=False)
        return Written(
            {
                "qweight": pack(q.T, 4, 1, _AWQ_COLUMNS),
                "qzeros": pack(z.T, 4, 1, _AWQ_COLUMNS),
                "scales": np.ascontiguousarray(s.T),
            },
            floats,
        )

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Writer(write, settings)


def gptq(bits: int, group: int, *, symmetric: bool, version: str = "gptq", desc_act: bool = False) -> Writer:
    def write(matrix: Array) -> Written:
        columns = matrix.shape[1]
        order = np.random.default_rng(columns).permutation(columns) if desc_act else np.arange(columns)
        q, z, s, floats = integers(matrix[:, order], bits, group, symmetric=symmetric)
        if version == "gptq":  # stored less one
            z = np.maximum(z, 1)
            groups = np.repeat(z, group, axis=1)
            floats = (q - groups).astype(np.float32) * np.repeat(s, group, axis=1).astype(np.float32)
        back = np.argsort(order)
        parts = {
            "qweight": pack(q[:, back].T, bits, 0),
            "qzeros": pack(z.T - (version == "gptq"), bits, 1),
            "scales": np.ascontiguousarray(s.T),
            "g_idx": (back // group).astype(np.int32),
        }
        return Written(parts, floats[:, back])

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": desc_act}
    return Writer(write, settings | {"checkpoint_format": version})


def packed(bits: int, group: int | None, *, symmetric: bool, scales: Any = ml_dtypes.bfloat16) -> Writer:
    """compressed-tensors' pack-quantized; group None: a scale a row."""

    def write(matrix: Array) -> Written:
        size = group or matrix.shape[1]
        q, z, s, floats = integers(matrix, bits, size, symmetric=symmetric, scales=scales)
        parts = {
            "weight_packed": pack(q, bits, 1),
            "weight_scale": s,
            "weight_shape": np.array(matrix.shape, np.int64),
        }
        return Written(parts if symmetric else parts | {"weight_zero_point": pack(z, bits, 0)}, floats)

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | ({} if group else {"strategy": "channel"})}}
    return Writer(write, compressed("pack-quantized", groups))


def int8_rows() -> Writer:
    """compressed-tensors' int-quantized: int8 with a scale a row."""

    def write(matrix: Array) -> Written:
        q, _, s, floats = integers(matrix, 8, matrix.shape[1], symmetric=True, scales=np.float32)
        return Written({"weight": (q - 128).astype(np.int8), "weight_scale": s}, floats)

    return Writer(write, compressed("int-quantized", {}))


def float8(scales: str, settings: dict[str, Any], *, name: str = "weight_scale", static: bool = False) -> Writer:
    """FP8 with scales of "tensor", "row" or "block" (32 x 32)."""

    def write(matrix: Array) -> Written:
        rows, columns = matrix.shape
        size = {"tensor": (rows, columns), "row": (1, columns), "block": (32, 32)}[scales]
        blocks = matrix.astype(np.float32).reshape(rows // size[0], size[0], columns // size[1], size[1])
        scale = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
        values = (blocks / scale[:, None, :, None]).astype(FLOAT8)
        floats = (values.astype(np.float32) * scale[:, None, :, None]).reshape(matrix.shape)
        parts = {"weight": values.reshape(matrix.shape), name: scale.reshape(()) if scales == "tensor" else scale}
        return Written(parts | ({"input_scale": np.array(0.02, np.float32)} if static else {}), floats)

    return Writer(write, settings)


def compressed(layout: str, groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


WRITERS: Mapping[str, Writer] = {
    "awq-32": awq(32),
    "awq-64": awq(64),
    "gptq-symmetric": gptq(4, 32, symmetric=True),
    "gptq-asymmetric": gptq(4, 32, symmetric=False),
    "gptq-v2": gptq(4, 32, symmetric=False, version="gptq_v2"),
    "gptq-desc-act": gptq(4, 32, symmetric=False, desc_act=True),
    "gptq-int8": gptq(8, 32, symmetric=False),
    "packed-int4": packed(4, 32, symmetric=True),
    "packed-int4-zeros": packed(4, 32, symmetric=False),
    "packed-int4-rows": packed(4, None, symmetric=False),
    "packed-int8": packed(8, 32, symmetric=False),
    "packed-int8-rows": packed(8, None, symmetric=True),
    "int8-rows": int8_rows(),
    "float8-rows": float8("row", compressed("float-quantized", {})),
    "float8-tensor": float8("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}, static=True),
    "float8-blocks": float8("block", {"quant_method": "fp8", "weight_block_size": [32, 32]}, name="weight_scale_inv"),
}


def quantisable(name: str) -> bool:
    """The matrices that these packages quantise in a language model."""
    return name.startswith("language_model.layers.") and name.endswith("_proj.weight")


def write_quantised(
    folder: Path, writer: Writer, tensors: Mapping[str, Array] | None = None, sizes: Sizes = SMALL
) -> tuple[Path, Path]:
    """A quantised checkpoint, and one of the floats that it stands for."""
    tensors = random_tensors(sizes) if tensors is None else tensors
    parts, floats = {}, {}
    for name, array in tensors.items():
        if not quantisable(name):
            parts[name] = floats[name] = array
            continue
        written = writer.write(array)
        floats[name] = written.floats
        parts |= {f"{name.removesuffix('weight')}{part}": value for part, value in written.parts.items()}
    plain = make_checkpoint(folder / "plain", floats, sizes=sizes)
    quantised = make_checkpoint(folder / "quantised", floats, sizes=sizes)
    write_safetensors(quantised / "model.safetensors", {named(name, HUB): array for name, array in parts.items()})
    write_json(quantised / "config.json", config(sizes) | {"quantization_config": writer.settings})
    return quantised, plain
