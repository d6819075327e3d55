"""Checkpoints that are quantised: the graphs hold their integers, and compute what their dequantised weights would."""

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import quantised_checkpoints as made
from checkpoints import HUB, config, named, random_tensors, write_json, write_safetensors
from engines.prepare import prepare
from engines.profiles import choose_target
from export.__main__ import main
from export.checkpoint import Checkpoint
from export.writer import ExportOptions, export
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.bundle import WeightFormat
from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.stages import CPU, DECODER, FIRST_LAYER, PORTABLE, TENSORRT, VISION
from quantised_checkpoints import SMALL, WRITERS, Writer, packed, quantisable, write_quantised
from targets import ON_CPU

INTEGERS = [name for name in WRITERS if not name.startswith("float8")]
ANSWERING = ["awq-32", "gptq-symmetric", "gptq-desc-act", "packed-int4-rows", "packed-int8", "float8-blocks"]
FLOAT8 = [name for name in WRITERS if name.startswith("float8")]
SCORING = re.compile(r"language_model\.layers\.0\.self_attn\.[qk]_proj\.weight")
runs_integers = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 25), reason=f"ONNX Runtime {ort.__version__} is below 1.25"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By writer: a quantised checkpoint, and one of the floats that it stands for."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_quantised(folder / name, writer) for name, writer in WRITERS.items()}


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    """By writer, target and dtype: the bundle of a quantised checkpoint, or of its floats."""
    folder, found = tmp_path_factory.mktemp("bundles"), {}

    def of(name, target=CPU, dtype="float32", *, plain=False):
        key = f"{name}-{target}-{dtype}-{plain}"
        if key not in found:
            options = ExportOptions(dtype=dtype, targets=(target,))
            found[key] = export(checkpoints[name][plain], folder / key, options)
        return found[key]

    return of


def prompt():
    """Text and an image of 16 visual tokens."""
    rng = np.random.default_rng(1)
    top = SMALL.vocab_size
    ids = [*range(10, 20), top - 3, *[top - 1] * 16, top - 4, *range(30, 40)]
    pixels = rng.standard_normal((64, 3 * 2 * 14 * 14), dtype=np.float32)
    return ModelInputs(np.array(ids), pixel_values=pixels, image_grid_thw=np.array([[1, 8, 8]]))


@pytest.mark.parametrize("name", WRITERS)
def test_every_matrix_is_read_as_the_floats_it_stands_for(checkpoints, name):
    quantised, plain = map(Checkpoint.open, checkpoints[name])
    assert plain.quantisation is None
    assert quantised.quantisation.method == WRITERS[name].settings["quant_method"]
    for tensor in filter(quantisable, random_tensors(SMALL)):
        np.testing.assert_array_equal(quantised.tensor(tensor).array(), plain.tensor(tensor).array(), strict=True)


def stored(bundle, tensor):
    """A tensor of a bundle's files."""
    raw = (bundle.folder / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]
    proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=[*tensor.shape.numpy()], raw_data=raw)
    return onnx.numpy_helper.to_array(proto)


def dequantised(bundle, node):
    """What onnx's reference makes of a DequantizeLinear node, and the checkpoint's name of the matrix."""
    inputs = {value.name: value.const_value for value in node.inputs}
    values, scales, *zeros = (stored(bundle, tensor) for tensor in inputs.values())
    axis, block = node.attributes["axis"].value, node.attributes["block_size"].value
    wide = [np.repeat(part.astype(np.float32), block, axis) if block else part[..., None] for part in (scales, *zeros)]
    floats = (values.astype(np.float32) - (wide[1] if zeros else 0)) * wide[0]
    return next(iter(inputs)).rsplit("/", 1)[0], floats


@pytest.mark.parametrize("name", INTEGERS)
def test_the_graphs_hold_the_integers_scales_and_zero_points_of_the_file(bundles, checkpoints, name):
    bundle = bundles(name)
    plain = Checkpoint.open(checkpoints[name][1])
    seen = set()
    for stage in (FIRST_LAYER, DECODER):
        graph = ir.load(bundle.folder / bundle.manifest.graph(stage, CPU).file).graph
        for node in graph:
            if node.op_type == "DequantizeLinear":
                matrix, floats = dequantised(bundle, node)
                expected = plain.tensor(matrix).array()
                if order := graph.initializers.get(f"{matrix}/order"):
                    tensor = order.const_value
                    raw = (bundle.folder / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]
                    expected = expected[:, np.frombuffer(raw, np.int64)]
                np.testing.assert_array_equal(floats.T, expected)
                seen.add(matrix)
    assert seen == {tensor for tensor in random_tensors(SMALL) if quantisable(tensor) and not SCORING.match(tensor)}
    assert bundle.manifest.weights.bits == (8 if "int8" in name else 4)


@runs_integers
@pytest.mark.parametrize("name", INTEGERS)
def test_onnx_runtime_multiplies_by_the_integers_themselves(bundles, tmp_path, name):
    bundle = bundles(name)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(bundle.folder / bundle.manifest.graph(DECODER, CPU).file, options, ["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert nodes.count("MatMulNBits") == (SMALL.layers - 1) * 7
    assert "DequantizeLinear" not in nodes


@runs_integers
@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize(
    "name",
    ["awq-32", "gptq-symmetric", "gptq-desc-act", "packed-int4-rows", "packed-int8", "int8-rows", "float8-blocks"],
)
def test_the_answer_is_that_of_the_dequantised_weights(bundles, name, target):
    results = []
    for plain in (False, True):
        with Pipeline.load(bundles(name, target, plain=plain).folder, target=target, threads=1) as pipe:
            pruning = PruningConfig(keep_ratio=0.5)
            results.append(
                pipe.generate(prompt(), pruning=pruning, max_new_tokens=4, ignore_eos=True, return_logits=True)
            )
    quantised, plain = results
    np.testing.assert_array_equal(quantised.scores, plain.scores)
    np.testing.assert_array_equal(quantised.kept_indices, plain.kept_indices)
    assert quantised.token_ids == plain.token_ids
    np.testing.assert_allclose(quantised.logits, plain.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["awq-32", "packed-int4-zeros", "gptq-int8"])
def test_tensorrt_gets_a_second_product_in_place_of_zero_points(bundles, checkpoints, name):
    bundle = bundles(name, TENSORRT)
    plain = Checkpoint.open(checkpoints[name][1])
    graph = ir.load(bundle.folder / bundle.manifest.graph(DECODER, TENSORRT).file).graph
    found = [node for node in graph if node.op_type == "DequantizeLinear"]
    assert len(found) == (SMALL.layers - 1) * 7
    assert all(len(node.inputs) == 2 for node in found)
    for node in found:
        matrix, floats = dequantised(bundle, node)
        block = node.attributes["block_size"].value
        tensor = graph.initializers[f"{matrix}/shift"].const_value
        raw = (bundle.folder / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]
        shift = np.frombuffer(raw, np.float32).reshape(tensor.shape.numpy())
        x = np.random.default_rng(0).standard_normal((5, len(floats)))
        assert shift.size * block == floats.size  # multiply-adds of either product
        means = x.reshape(5, -1, block).mean(-1)
        exact = x @ plain.tensor(matrix).array().T.astype(np.float64)
        np.testing.assert_allclose(x @ floats.astype(np.float64) + means @ shift.astype(np.float64), exact, atol=1e-6)


@pytest.mark.parametrize(("name", "target", "opset"), [("packed-int8-rows", TENSORRT, 24), ("int8-rows", PORTABLE, 19)])
def test_tensorrt_gets_one_scale_for_each_row_of_8_bit_integers(bundles, checkpoints, name, target, opset):
    bundle = bundles(name, target)
    plain = Checkpoint.open(checkpoints[name][1])
    model = ir.load(bundle.folder / bundle.manifest.graph(DECODER, target).file)
    assert model.opset_imports[""] == opset
    found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(found) == (SMALL.layers - 1) * 7
    for node in found:
        assert node.attributes["axis"].value == 1 and "block_size" not in node.attributes
        integers, scales = (stored(bundle, value.const_value) for value in node.inputs)
        expected = plain.tensor(node.inputs[0].name.removesuffix("/integers")).array()
        np.testing.assert_array_equal((integers * scales).T, expected)
    assert bundle.manifest.weights == WeightFormat(8, 0)
    assert choose_target(bundle.manifest, "10.16.1", target) == target


def test_8_bit_integers_in_blocks_count_where_a_checkpoint_has_both(checkpoints, tmp_path):
    rows, plain = (Checkpoint.open(checkpoints[name][0]) for name in ("packed-int8-rows", "packed-int8"))
    assert (rows.quantisation.weights, plain.quantisation.weights) == (WeightFormat(8, 0), WeightFormat(8, 32))
    mixed = iter([packed(8, 32, symmetric=True), *[packed(8, None, symmetric=True)] * 100])
    writer = Writer(lambda matrix: next(mixed).write(matrix), packed(8, None, symmetric=True).settings)
    folder, _ = write_quantised(tmp_path / "mixed", writer)
    assert Checkpoint.open(folder).quantisation.weights == WeightFormat(8, 32)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_stays_so_for_tensorrt_alone(bundles, checkpoints, name):
    plain = Checkpoint.open(checkpoints[name][1])
    for target in (TENSORRT, CPU):
        bundle = bundles(name, target)
        graph = ir.load(bundle.folder / bundle.manifest.graph(DECODER, target).file).graph
        found = [node for node in graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()]
        assert len(found) == ((SMALL.layers - 1) * 7 if target == TENSORRT else 0)
        for node in found:
            matrix, floats = dequantised(bundle, node)
            np.testing.assert_array_equal(floats, plain.tensor(matrix).array())
        rounded = [node for node in graph if node.op_type == "QuantizeLinear"]
        assert len(rounded) == (len(found) if name == "float8-tensor" else 0)  # static scales of activations


def test_engines_get_graphs_that_onnx_takes(bundles):
    for name in ("awq-32", "float8-tensor"):
        bundle = bundles(name, TENSORRT, "float16")
        for stage in (VISION, FIRST_LAYER, DECODER):
            graph = prepare(bundle, stage, TENSORRT, max_context=64, plugin=False)
            onnx.load_from_string(graph.content)


def test_the_command_tells_what_it_read(checkpoints, tmp_path, capsys):
    assert main([str(checkpoints["awq-32"][0]), "--out", str(tmp_path / "out"), "--target", "cpu"]) == 0
    out = capsys.readouterr().out
    assert (
        "read: awq, 21 matrices int4 with groups of 32 and zero points; not quantised: the vision tower, lm_head" in out
    )
    assert "int4 weights in blocks of 32, float32" in out


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("awq-32", "float32", []),
        ("awq-32", "float16", []),
        ("awq-32", "bfloat16", ["float16 and get rounded to bfloat16; --dtype float16 keeps them"]),
        (
            "float8-blocks",
            "bfloat16",
            ["FP8 weights stay so for the target tensorrt alone; cuda, portable get them"],
        ),
    ],
)
def test_a_note_tells_what_is_not_what_the_file_holds(checkpoints, name, dtype, expected):
    targets = ExportOptions(dtype=dtype).targets
    notes = Checkpoint.open(checkpoints[name][0]).quantisation.notes(dtype, targets)
    assert [told in note for told, note in zip(expected, notes, strict=True)] == [True] * len(expected)


def test_quantised_weights_are_neither_linked_nor_quantised_again(checkpoints, tmp_path):
    for options in (ExportOptions(link=True), ExportOptions(weights=WeightFormat(4, 32))):
        with pytest.raises(InvalidInput, match=r"quantised \(awq\).*neither linked nor quantised again"):
            export(checkpoints["awq-32"][0], tmp_path / "out", options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes.*or one of awq, gptq"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4 cannot be exported"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq: version: got gemv, expected gemm"),
        ({"quant_method": "gptq", "bits": 3}, "gptq: bits: got 3, expected 4, 8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt: quant_algo: got NVFP4, expected fp8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format: got nvfp4-pack-quantized"),
    ],
)
def test_other_formats_are_refused_by_name_with_what_to_take_instead(tmp_path, settings, message):
    quantised, _ = write_quantised(tmp_path, WRITERS["awq-32"])
    write_json(quantised / "config.json", config(SMALL) | {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(quantised)


def test_groups_of_unequal_size_are_refused(tmp_path):
    writer = made.gptq(4, 32, symmetric=True)

    def uneven(matrix):
        written = writer.write(matrix)
        group_of = written.parts["g_idx"].copy()
        group_of[0] = 1
        return made.Written(written.parts | {"g_idx": group_of}, written.floats)

    quantised, _ = write_quantised(tmp_path, made.Writer(uneven, writer.settings))
    with pytest.raises(CheckpointError, match=r"g_idx: expected 32 inputs in every group.*without desc_act"):
        Checkpoint.open(quantised)


def test_a_part_that_is_missing_or_of_another_shape_is_named(tmp_path):
    quantised, _ = write_quantised(tmp_path, WRITERS["awq-32"])
    name = named("language_model.layers.0.self_attn.v_proj.", HUB)
    matrix = random_tensors(SMALL)["language_model.layers.0.self_attn.v_proj.weight"]
    parts = {f"{name}{part}": value for part, value in WRITERS["awq-32"].write(matrix).parts.items()}
    for changed, message in (
        ({"scales": None}, "no tensor scales beside qweight, qzeros"),
        ({"qzeros": np.zeros((1, 4), np.int32)}, r"v_proj\.qzeros: shape \[1, 4\], its integers ask for \[2, 4\]"),
        ({"qweight": np.zeros((64, 4), np.float16)}, r"v_proj\.qweight: got float16\[64, 4\], expected int32"),
    ):
        changed = {f"{name}{part}": value for part, value in changed.items()}
        left = {part: value for part, value in (parts | changed).items() if value is not None}
        write_safetensors(quantised / "model.safetensors", left)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(quantised)


@pytest.mark.parametrize(
    ("name", "part", "values"),
    [
        ("int8-rows", "weight_scale", np.ones(3, np.float32)),
        ("int8-rows", "weight_zero_point", np.zeros((3, 1), np.int8)),
        ("packed-int4-zeros", "weight_zero_point", np.zeros((64, 2), np.int32)),
        ("packed-int4-zeros", "weight_scale", np.ones((64, 2, 1), np.float32)),
    ],
)
def test_scales_and_zero_points_of_another_shape_are_named(tmp_path, name, part, values):
    writer = WRITERS[name]
    wrong = Writer(lambda matrix: made.Written(writer.write(matrix).parts | {part: values}, matrix), writer.settings)
    quantised, _ = write_quantised(tmp_path, wrong)
    with pytest.raises(CheckpointError, match=rf"q_proj\.{part}: shape \[.*\], its integers ask for \["):
        Checkpoint.open(quantised)


def test_modelopts_settings_may_lie_in_a_file_of_their_own(tmp_path):
    quantised, _ = write_quantised(tmp_path, WRITERS["float8-tensor"])
    write_json(quantised / "config.json", config(SMALL))
    with pytest.raises(CheckpointError, match=r"neither config\.json nor hf_quant_config\.json says how"):
        Checkpoint.open(quantised)
    write_json(quantised / "hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}})
    assert Checkpoint.open(quantised).quantisation.method == "modelopt"


def test_a_scale_that_the_dtype_cannot_hold_is_refused(tmp_path):
    tensors = random_tensors(SMALL)
    name = "language_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * np.float32(1e7)
    quantised, _ = write_quantised(tmp_path, made.packed(4, 32, symmetric=True), tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: a scale: infinite, or too large for float16"):
        export(quantised, tmp_path / "out", ExportOptions(dtype="float16"))
