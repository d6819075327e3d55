"""int8 and int4 weights: what is stored, that the runtime multiplies by it, and that the same tokens are kept."""

import dataclasses
import hashlib
import json
import re
import shutil
import tracemalloc

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from checkpoints import Sizes, make_checkpoint, make_sparse_checkpoint, random_tensors
from engines.prepare import prepare
from examples.tiny_task.samples import generate
from export.__main__ import main
from export.checkpoint import Checkpoint
from export.quantisation import WHOLE_ROW, layout, quantise
from export.writer import ExportOptions, export
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.bundle import MANIFEST, Bundle, WeightFormat
from hawk_trt.errors import BackendError, BundleError, CheckpointError, InvalidInput
from hawk_trt.runtime import onnxruntime as ort_backend
from hawk_trt.runtime.comparison import TOLERANCES, tolerance_of
from hawk_trt.stages import CPU, DECODER, FIRST_LAYER, PORTABLE, TENSORRT, VISION
from targets import ON_CPU

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MATRIX = re.compile(r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight|.*(embed_tokens|lm_head)\.weight")
SCORING = {f"language_model.layers.0.self_attn.{letter}_proj.weight" for letter in "qk"}
SMALL = Sizes(intermediate_size=128)
INT8, INT4 = WeightFormat(8, 64), WeightFormat(4, 64)
runs_integers = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 25), reason=f"ONNX Runtime {ort.__version__} is below 1.25"
)


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tmp_path_factory):
    """The tiny model in int8 and int4."""
    folder = tmp_path_factory.mktemp("quantised")
    return {w.bits: export(tiny_checkpoint, folder / str(w.bits), ExportOptions(weights=w)) for w in (INT8, INT4)}


def one_matrix(tmp_path, values):
    """A checkpoint whose o_proj of layer 1 has these values, and that tensor."""
    tensors = random_tensors(SMALL)
    name = "language_model.layers.1.self_attn.o_proj.weight"
    return Checkpoint.open(make_checkpoint(tmp_path, tensors | {name: values}, sizes=SMALL)).tensor(name)


def read_back(packed, scales, weights):
    """What DequantizeLinear makes of the bytes, in onnx's reference: [in, out]."""
    dtype = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[weights.bits]
    shape = (packed.shape[0], packed.shape[1] * 8 // weights.bits)
    integers = onnx.helper.make_tensor("integers", dtype, shape, packed.tobytes(), raw=True)
    scale = onnx.numpy_helper.from_array(scales.astype(np.float32), "scales")
    node = onnx.helper.make_node(
        "DequantizeLinear", ["integers", "scales"], ["floats"], axis=0, block_size=weights.block_size
    )
    out = onnx.helper.make_tensor_value_info("floats", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph([node], "g", [], [out], [integers, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 64])
def test_integers_and_scales_give_the_matrix_back_to_half_a_step(tmp_path, bits, block_size, dtype):
    weights = WeightFormat(bits, block_size)
    matrix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    matrix[3, :block_size] = 0
    packed, scales = quantise(one_matrix(tmp_path, matrix), weights, dtype)
    assert scales.dtype == NUMPY[dtype]
    assert packed.nbytes == layout((64, 64), weights, dtype)[0] == 64 * 64 * bits // 8
    found = read_back(packed, scales, weights)
    steps = np.repeat(scales.astype(np.float32), block_size, axis=0)
    limit = (1 << bits - 1) - 1
    inside = np.abs(matrix.T) <= limit * steps
    assert np.abs(found - matrix.T)[inside].max() <= 0.5001 * steps.max()
    assert np.all(np.abs(found - matrix.T) <= 2.0001 * steps)  # what was clipped lost no more than two
    assert not found.T[3, :block_size].any()
    relative = np.linalg.norm(found - matrix.T) / np.linalg.norm(matrix)
    assert relative < {4: 0.11, 8: 0.008}[bits]  # a normal distribution: 0.090 and 0.098, 0.0053 and 0.0062


def test_a_row_of_8_bit_integers_can_share_a_scale(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((64, 192)).astype(np.float32)
    by_row = WeightFormat(8, WHOLE_ROW)
    packed, scales = quantise(one_matrix(tmp_path, matrix), by_row, "float32")
    assert scales.shape == (3, 64)  # ONNX Runtime gets it once for every 64
    np.testing.assert_array_equal(scales, np.broadcast_to(np.abs(matrix).max(1) / np.float32(127), scales.shape))
    assert np.abs(read_back(packed, scales, WeightFormat(8, 64)) - matrix.T).max() <= 0.5001 * scales.max()


@runs_integers
def test_tensorrt_and_onnx_runtime_share_the_integers_of_rows_and_answer_alike(tmp_path):
    folder = make_checkpoint(tmp_path / "model", sizes=SMALL)
    options = ExportOptions(weights=WeightFormat(8, WHOLE_ROW), targets=(CPU, TENSORRT, PORTABLE))
    bundle = export(folder, tmp_path / "out", options)
    found = {}
    for target in options.targets:
        graph = ir.load(bundle.folder / bundle.manifest.graph(DECODER, target).file).graph
        node = next(node for node in graph if node.op_type == "DequantizeLinear")
        integers, scales = (value.const_value for value in node.inputs)
        found[target] = (integers.offset, scales.offset, list(scales.shape), node.attributes["axis"].value)
    blocks = found[CPU][2]
    assert found[TENSORRT] == found[PORTABLE] == (*found[CPU][:2], blocks[1:], 1)
    assert found[CPU][3] == 0 and len(blocks) == 2
    assert bundle.manifest.precision == "int8 weights with a scale a row, float32"
    ids = ModelInputs(np.arange(12))
    cpu, portable = (
        Pipeline.load(bundle.folder, target=target, threads=1).generate(
            ids, max_new_tokens=4, ignore_eos=True, return_logits=True
        )
        for target in (CPU, PORTABLE)
    )
    # the target cpu rounds activations to 8 bits
    np.testing.assert_allclose(cpu.logits, portable.logits, rtol=0, atol=0.03 * np.abs(portable.logits).max())


def test_the_scale_that_loses_least_is_taken(tmp_path):
    exact = np.tile(np.array([-7, 7, 3, -2, 0, 1, 5, -6], np.float32), (64, 8))  # 7 steps to the largest
    _, scales = quantise(one_matrix(tmp_path / "a", exact), INT4, "float32")
    np.testing.assert_array_equal(scales, 1)
    exact[:, ::2] = -8  # now 8
    packed, scales = quantise(one_matrix(tmp_path / "b", exact), INT4, "float32")
    np.testing.assert_array_equal(scales, 1)
    np.testing.assert_array_equal(read_back(packed, scales, INT4), exact.T)


def test_what_is_no_number_cannot_be_quantised(tmp_path):
    for place, value in enumerate((np.nan, np.inf)):
        matrix = np.ones((64, 64), np.float32)
        matrix[5, 5] = value
        with pytest.raises(CheckpointError, match=r"o_proj\.weight: it holds an infinite value, NaN, or one too large"):
            quantise(one_matrix(tmp_path / str(place), matrix), INT4, "float32")


@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize("tied", [True, False])
def test_all_matrices_of_the_language_model_are_integers_but_those_that_score(tmp_path, target, tied):
    folder = make_checkpoint(tmp_path / "model", sizes=SMALL, tied=tied)
    bundle = export(folder, tmp_path / "out", ExportOptions(weights=WeightFormat(4, 32), targets=(target,)))
    floats, integers = set(), set()
    for entry in bundle.manifest.graphs:
        graph = ir.load(bundle.folder / entry.file)
        for name, value in graph.graph.initializers.items():
            if name.endswith("/integers"):
                assert value.dtype == ir.DataType.INT4
                integers.add(name.removesuffix("/integers"))
            elif isinstance(value.const_value, ir.ExternalTensor) and not name.endswith("/scales"):
                floats.add(name)
        assert graph.opset_imports[""] == {VISION: {PORTABLE: 18, CPU: 24}[target]}.get(
            entry.stage, {PORTABLE: 21, CPU: 24}[target]
        )
    expected = {name for name in random_tensors(SMALL, tied=tied) if MATRIX.fullmatch(name)} - SCORING
    if not tied:
        expected.remove("language_model.embed_tokens.weight")  # looked up, never multiplied
    assert integers == expected
    assert floats >= SCORING
    assert not floats & integers
    np.testing.assert_array_equal(
        bundle.embedding_table(), random_tensors(SMALL, tied=tied)["language_model.embed_tokens.weight"]
    )


def test_a_matrix_that_does_not_fill_its_blocks_stays_in_floating_point(tmp_path):
    folder = make_checkpoint(tmp_path / "model", sizes=Sizes(intermediate_size=96))
    bundle = export(folder, tmp_path / "out", ExportOptions(weights=INT4))
    names = set(ir.load(bundle.folder / "decoder.cpu.onnx").graph.initializers)
    assert "language_model.layers.1.mlp.down_proj.weight" in names
    assert "language_model.layers.1.mlp.up_proj.weight/integers" in names


@runs_integers
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ON_CPU)
def test_onnx_runtime_multiplies_by_the_integers_themselves(bundles, tmp_path, bits, target):
    for stage, count in ((FIRST_LAYER, 5), (DECODER, 3 * 7 + 1)):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(
            bundles[bits].folder / bundles[bits].manifest.graph(stage, target).file, options, ["CPUExecutionProvider"]
        )
        nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
        assert nodes.count("MatMulNBits") == count
        assert "DequantizeLinear" not in nodes


@runs_integers
@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_tokens_are_kept_with_the_same_scores(bundles, tiny_bundle, bits, target):
    with (
        Pipeline.load(tiny_bundle, target=target, threads=1) as floats,
        Pipeline.load(bundles[bits].folder, target=target, threads=1) as integers,
    ):
        for sample in generate(5, 5):
            inputs = floats.prepare(sample.question, images=[sample.image])
            for keep_ratio in (1.0, 0.2, 0.1):
                one, other = (
                    pipe.generate(inputs, pruning=PruningConfig(keep_ratio), max_new_tokens=1)
                    for pipe in (floats, integers)
                )
                np.testing.assert_array_equal(one.kept_indices, other.kept_indices)
                np.testing.assert_array_equal(one.scores, other.scores)


@runs_integers
@pytest.mark.parametrize("bits", [8, 4])
def test_the_tiny_model_still_knows_its_task(bundles, bits):
    samples = list(generate(6, 30))
    with Pipeline.load(bundles[bits].folder, threads=1) as pipe:
        for keep_ratio, least in ((1.0, 29), (0.1, 27)):
            answers = [
                pipe.generate(s.question, [s.image], pruning=PruningConfig(keep_ratio), max_new_tokens=8).text
                for s in samples
            ]
            assert sum(text == s.answer for text, s in zip(answers, samples, strict=True)) >= least


@runs_integers
@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_weights_that_fit_their_integers_exactly_change_nothing(tmp_path, activations):
    exact = random_tensors(SMALL)
    for name in exact:
        if MATRIX.fullmatch(name) and name not in SCORING:
            integers = np.random.default_rng(len(name)).integers(-7, 8, exact[name].shape)
            integers[:, ::32] = 7
            exact[name] = (integers / 64).astype(np.float32)
    folder = make_checkpoint(tmp_path / "model", exact, sizes=SMALL)
    plain = export(folder, tmp_path / "plain", ExportOptions(dtype=activations))
    quantised = export(folder, tmp_path / "int4", ExportOptions(dtype=activations, weights=WeightFormat(4, 32)))
    logits = []
    for bundle in (plain, quantised):
        with Pipeline.load(bundle.folder, threads=1) as pipe:
            prompt = ModelInputs(np.arange(10, 40))
            result = pipe.generate(prompt, max_new_tokens=4, ignore_eos=True, return_logits=True)
            logits.append(result.logits)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol={"float32": 2e-5, "float16": 2e-2}[activations])


def test_engines_get_graphs_that_onnx_takes(bundles):
    for stage in (FIRST_LAYER, DECODER):
        for target in ON_CPU:
            graph = prepare(bundles[4], stage, target, max_context=64, plugin=False)
            model = onnx.load_from_string(graph.content)
            assert {node.op_type for node in model.graph.node} >= {"DequantizeLinear", "MatMul"}
            assert graph.weight_bytes < (bundles[4].folder / f"{stage}.data").stat().st_size + 1e6


def test_the_manifest_tells_the_format(bundles, tiny_bundle):
    plain = Bundle.load(tiny_bundle).manifest
    assert (plain.schema_version, plain.weights, plain.precision) == (6, None, "float32")
    manifest = bundles[4].manifest
    assert (manifest.schema_version, manifest.weights, manifest.dtype) == (6, INT4, "float32")
    assert manifest.precision == "int4 weights in blocks of 64, float32"


def test_a_bundle_of_an_older_schema_is_refused_with_the_command(tiny_bundle, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(tiny_bundle, folder)
    fields = json.loads((folder / MANIFEST).read_text()) | {"schema_version": 5}
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=r"schema version 5, this hawk_trt reads 6\. Export again: hawk-trt export "):
        Bundle.load(folder)


def test_a_field_that_is_newer_than_the_bundle_takes_its_default(tiny_bundle, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(tiny_bundle, folder)
    fields = json.loads((folder / MANIFEST).read_text())
    del fields["weights"], fields["manifest_sha256"]
    digest = hashlib.sha256(msgspec.json.encode(fields)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(fields | {"manifest_sha256": digest}))
    assert Bundle.load(folder).manifest.weights is None


def test_another_format_is_another_bundle(tiny_checkpoint, tmp_path, capsys):
    def exported(*options):
        assert main([str(tiny_checkpoint), "--out", str(tmp_path), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert exported("--dtype", "int4")["weights"] == {"bits": 4, "block_size": 64}
    assert exported("--dtype", "int4")["up_to_date"]
    for options in (["--block-size", "128"], ["--activations", "float16"]):
        assert not exported("--dtype", "int4", *options)["up_to_date"]
    found = exported("--dtype", "int8", "--activations", "bfloat16")
    assert (found["dtype"], found["weights"]["bits"]) == ("bfloat16", 8)
    assert exported("--dtype", "int4", "--target", "cuda")["dtype"] == "float16"
    assert exported("--dtype", "int4", "--target", "cuda,cpu")["dtype"] == "float32"


def test_what_does_not_go_together_is_refused_by_name(tmp_path, capsys):
    for options, message in (
        (["--activations", "float16"], "--activations, --block-size: only with --dtype int4 or int8, got float32"),
        (["--dtype", "int4", "--block-size", "48"], 'Invalid value "48" for --block-size'),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), "--out", str(tmp_path), *options])
        assert message in capsys.readouterr().err
    assert main([str(tmp_path), "--out", str(tmp_path), "--dtype", "int4", "--link"]) == 1
    assert "link: got int4 weights, which are made from the checkpoint's" in capsys.readouterr().err
    assert ExportOptions("bfloat16", weights=INT4).targets == ("tensorrt", "portable")
    message = "targets of quantised weights with bfloat16: got cuda, expected of tensorrt, portable"
    with pytest.raises(InvalidInput, match=message):
        ExportOptions("bfloat16", ("cuda",), weights=INT4)
    with pytest.raises(InvalidInput, match="block_size: got 16, expected one of 32, 64, 128"):
        ExportOptions(weights=WeightFormat(4, 16))


def test_an_onnx_runtime_that_would_be_slow_says_so(bundles, monkeypatch):
    monkeypatch.setattr(ort_backend.ort, "__version__", "1.24.4")
    with pytest.raises(BackendError, match=r"weights: got int4, which ONNX Runtime 1\.24\.4 cannot multiply by"):
        Pipeline.load(bundles[4].folder)


def test_bfloat16_beside_integers_is_refused_where_onnx_runtime_loads_it(bundles):
    with pytest.raises(BackendError, match="got int4 with bfloat16 activations, which ONNX Runtime cannot run"):
        ort_backend._check_weights(dataclasses.replace(bundles[4].manifest, dtype="bfloat16"))


def test_memory_grows_by_one_quantised_matrix(tmp_path):
    folder = make_sparse_checkpoint(tmp_path / "model", Sizes(vocab_size=500_000), shards=1)
    small = make_sparse_checkpoint(tmp_path / "small", Sizes(), shards=1)
    export(small, tmp_path / "warm", ExportOptions(weights=WeightFormat(4, 32)))
    tracemalloc.start()
    try:
        export(folder, tmp_path / "out", ExportOptions(weights=WeightFormat(4, 32)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24e6 + sum(layout((500_000, 64), WeightFormat(4, 32), "float32")[::2])


@runs_integers
def test_parity_holds_a_quantised_bundle_to_its_own_tolerance(bundles, tiny_checkpoint, capsys):
    options = ["--keep-ratio", "0.2", "--steps", "4", "--json"]
    assert hawk_trt(["parity", str(bundles[8].folder), "--checkpoint", str(tiny_checkpoint), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "int8 weights in blocks of 64, float32"
    assert report["tolerance"]["scores"]["cosine"] == TOLERANCES["float32"].scores.cosine
    errors = [row["max_error_share"] for case in report["cases"] for row in case["stages"] if row["stage"] == "decoder"]
    assert max(errors) > TOLERANCES["float32"].decoder.max_error
    int8, int4 = (tolerance_of(bundles[bits].manifest) for bits in (8, 4))
    assert int4.kl > int8.kl > TOLERANCES["float32"].kl
