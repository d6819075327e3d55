"""What writers of quantised checkpoints do in more ways than one, and the formats that are refused by name."""

import ml_dtypes
import numpy as np
import pytest

from checkpoints import HUB, Sizes, config, make_checkpoint, named, random_tensors, write_json, write_raw_safetensors
from checkpoints import write_safetensors as write
from export.checkpoint import Checkpoint
from hawk_trt.errors import CheckpointError
from quantised_checkpoints import FLOAT8, SMALL, WRITERS, Writer, Written, gptq, quantisable, write_quantised

ODD = Sizes(hidden_size=96, intermediate_size=160, vocab_size=32)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
MODELOPT = {"quant_method": "modelopt"}


def blocks(size, scales=np.float32, name="weight_scale_inv"):
    """FP8 in blocks, the last of a row or column smaller, with scales that are powers of two."""

    def written(matrix):
        rows, columns = (-(-count // size) for count in matrix.shape)
        padded = np.zeros((rows * size, columns * size), np.float32)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        by_block = padded.reshape(rows, size, columns, size)
        scale = np.exp2(np.ceil(np.log2(np.abs(by_block).max((1, 3)) / 448))).astype(scales)
        wide = scale.astype(np.float32)[:, None, :, None]
        values = (by_block / wide).astype(FLOAT8)
        parts, floats = (
            np.ascontiguousarray(array.reshape(padded.shape)[: matrix.shape[0], : matrix.shape[1]])
            for array in (values, values.astype(np.float32) * wide)
        )
        return Written({"weight": parts, name: scale}, floats)

    return Writer(written, {"quant_method": "fp8", "weight_block_size": [size, size]})


def changed(writer, change, settings=None):
    """A writer whose parts are changed, by name."""

    def written(matrix):
        result = writer.write(matrix)
        return Written(change(result.parts), result.floats)

    return Writer(written, settings or writer.settings)


def mixed_bits(matrix):
    return (gptq(8, 32, symmetric=False) if len(matrix) == 64 else gptq(4, 32, symmetric=True)).write(matrix)


KINDS = {
    "a gptq_v2 by the newer key": Writer(WRITERS["gptq-v2"].write, GPTQ | {"format": "gptq_v2"}),
    "bits of single modules": Writer(mixed_bits, GPTQ | {"dynamic": {"-:.*visual.*": {}, "+:.*": {"bits": 8}}}),
    "static activations of int8": changed(
        WRITERS["int8-rows"],
        lambda parts: parts | {"input_scale": np.ones(1, np.float32), "input_zero_point": np.ones(1, np.int8)},
    ),
    "scales of int8 rows without a second dimension": changed(
        WRITERS["int8-rows"], lambda parts: parts | {"weight_scale": parts["weight_scale"].reshape(-1)}
    ),
    "groups of which all are said to be the first": changed(
        WRITERS["gptq-symmetric"], lambda parts: parts | {"g_idx": np.zeros_like(parts["g_idx"])}
    ),
    "static activations by another name": changed(
        WRITERS["float8-tensor"],
        lambda parts: {{"input_scale": "activation_scale"}.get(name, name): part for name, part in parts.items()},
    ),
    "blocks that do not fill a matrix": blocks(64),
    "scales of e8m0": blocks(32, ml_dtypes.float8_e8m0fnu),
    "scales of bfloat16": blocks(32, ml_dtypes.bfloat16),
    "ModelOpt's blocks of four dimensions": changed(
        blocks(32, name="weight_scale"),
        lambda parts: parts | {"weight_scale": parts["weight_scale"][:, None, :, None]},
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
    ),
    "ModelOpt's rows": changed(
        WRITERS["float8-rows"],
        lambda parts: parts | {"weight_scale": parts["weight_scale"].reshape(-1)},
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_read_as_the_floats_it_stands_for(tmp_path, kind):
    sizes = ODD if "fill" in kind else SMALL
    quantised, plain = map(Checkpoint.open, write_quantised(tmp_path, KINDS[kind], sizes=sizes))
    for name in filter(quantisable, random_tensors(sizes)):
        np.testing.assert_array_equal(quantised.tensor(name).array(), plain.tensor(name).array(), strict=True)
    assert ("static" in quantised.quantisation.told) == (kind == "static activations by another name")


def test_graphs_get_equal_blocks_where_the_files_do_not_fill_a_matrix(tmp_path):
    quantised, plain = map(
        Checkpoint.open, write_quantised(tmp_path, KINDS["blocks that do not fill a matrix"], sizes=ODD)
    )
    name = "language_model.layers.1.mlp.down_proj.weight"
    matrix = quantised.tensor(name)
    scales = np.concatenate(list(matrix.parts_in_graph("bfloat16")["scales"].make())).reshape(96, -1)
    assert matrix.block_size * scales.shape[1] == 160
    floats = matrix.values.array().astype(np.float32) * np.repeat(scales, matrix.block_size, axis=1)
    np.testing.assert_array_equal(floats, plain.tensor(name).array())


def test_settings_may_lie_with_the_language_model_and_scales_of_the_kv_cache_are_left_out(tmp_path):
    quantised, _ = write_quantised(tmp_path, WRITERS["awq-32"])
    tensors = random_tensors(SMALL)
    parts = {f"model.layers.0.self_attn.{name}": np.ones(1, np.float32) for name in ("k_scale", "k_proj.k_scale")}
    for name, array in tensors.items():
        written = WRITERS["awq-32"].write(array).parts if quantisable(name) else {"weight": array}
        base = name.removesuffix("weight") if len(written) > 1 else ""
        parts |= {named(base + part if base else name, HUB): value for part, value in written.items()}
    write(quantised / "model.safetensors", parts)
    write_json(
        quantised / "config.json", config(SMALL) | {"llm_config": {"quantization_config": WRITERS["awq-32"].settings}}
    )
    opened = Checkpoint.open(quantised)
    assert opened.quantisation.told.startswith("awq, 21 matrices int4 with groups of 32")
    scales = {named(name, {"model.": "language_model."}) for name in parts if name.endswith("_scale")}
    assert not scales & opened.tensors.keys()


def parts_of(method, matrix):
    """What other writers store of a matrix."""
    octets, floats, rows = np.zeros((matrix.size // 2, 1), np.uint8), np.zeros(4, np.float32), len(matrix)
    return {
        "bitsandbytes": {"weight": octets, "weight.absmax": floats, "weight.quant_state.bitsandbytes__nf4": octets},
        "llm_int8": {"weight": matrix.astype(np.int8), "SCB": np.zeros(rows, np.float32)},
        "mxfp4": {"weight_blocks": octets, "weight_scales": octets},
        "aqlm": {"codes": matrix.astype(np.int8), "codebooks": floats, "scales": floats},
        "eetq": {"weight": matrix.astype(np.int8), "weight_scales": floats},
        "hqq": {"W_q": octets, "scale": floats, "zero": floats},
        "quanto": {"weight._data": matrix.astype(np.int8), "weight._scale": floats},
        "NVFP4": {"weight": octets, "weight_scale": octets.astype(FLOAT8), "weight_scale_2": floats},
        "gguf": {"weight": octets},
    }[method]


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "llm_int8", "mxfp4", "aqlm", "eetq", "hqq", "quanto", "NVFP4", "gguf"]
)
def test_other_formats_are_refused_by_name(tmp_path, method):
    settings = MODELOPT | {"quant_algo": method} if method == "NVFP4" else {"quant_method": method}
    quantised, _ = write_quantised(tmp_path, Writer(lambda matrix: Written(parts_of(method, matrix), matrix), settings))
    with pytest.raises(CheckpointError, match=rf"quantised with .*{method}.*Take the checkpoint that it was made from"):
        Checkpoint.open(quantised)


def test_a_format_is_named_where_its_files_cannot_be_read(tmp_path):
    folder = make_checkpoint(tmp_path, {})
    write_json(folder / "config.json", config() | {"quantization_config": {"quant_method": "torchao"}})
    entry = {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}
    write_raw_safetensors(folder / "model.safetensors", {"model.x.weight": entry}, b"ab")
    with pytest.raises(CheckpointError, match="quantised with torchao cannot be exported"):
        Checkpoint.open(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="quantised with torchao cannot be exported"):
        Checkpoint.open(folder)


def test_a_shape_of_three_numbers_is_refused(tmp_path):
    writer = changed(WRITERS["packed-int4"], lambda parts: parts | {"weight_shape": np.ones(3, np.int64)})
    with pytest.raises(CheckpointError, match=r"weight_shape: shape \[3\], its integers ask for \[2\]"):
        Checkpoint.open(write_quantised(tmp_path, writer)[0])
