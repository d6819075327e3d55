"""The exported graphs: well-formed, readable, and equal to PyTorch's own layers."""

import re
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from checkpoints import Sizes, make_checkpoint, random_tensors
from export.__main__ import main as export
from hawk_trt.bundle import Bundle
from hawk_trt.stages import (
    CONTEXT_SLOTS,
    CPU,
    CUDA,
    DECODER,
    DTYPES,
    FIRST_LAYER,
    NORMALIZATIONS,
    PORTABLE,
    TARGETS,
    TENSORRT,
    in_place,
)

WORDS = {
    "batch", "seq_len", "num_text", "num_visual", "num_kept_total", "past_len", "cache_len", "context_len",
    "num_frames", "num_patches", "num_windows", "window_len",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint = make_checkpoint(folder / "checkpoint")
    for dtype in DTYPES:
        assert export([str(checkpoint), "--out", str(folder / dtype), "--dtype", dtype]) == 0
    for normalization in NORMALIZATIONS[1:]:
        out = str(folder / normalization)
        assert export([str(checkpoint), "--out", out, "--normalization", normalization]) == 0
    return folder


def graph_files(bundles):
    return sorted(bundles.glob("*/*.onnx"))


def test_every_graph_passes_the_checker_and_strict_shape_inference(bundles, tmp_path):
    files = graph_files(bundles)
    assert len(files) == 4 * 12 + 9  # bfloat16 without cpu
    for file in files:
        onnx.checker.check_model(file, full_check=True)
        onnx.shape_inference.infer_shapes_path(
            file, tmp_path / "inferred.onnx", check_type=True, strict_mode=True, data_prop=True
        )


def test_every_node_has_a_readable_name_and_every_dynamic_dimension_its_word(bundles):
    for file in graph_files(bundles):
        graph = onnx.load(file, load_external_data=False).graph
        names = [node.name for node in graph.node]
        assert len(set(names)) == len(names)
        for node in graph.node:
            assert re.fullmatch(r"[A-Za-z][\w./]*[A-Za-z0-9]", node.name), node.name
            assert not re.fullmatch(rf"(node_)?{node.op_type}_?\d*", node.name) or node.name == node.op_type
        for value in [*graph.input, *graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                assert dim.HasField("dim_value") or dim.dim_param in WORDS, (file.name, value.name, dim)


def test_graphs_have_the_inputs_and_outputs_that_the_manifest_tells(bundles):
    names = dict.fromkeys(onnx.TensorProto.DataType.values())
    for name in names:
        names[name] = onnx.TensorProto.DataType.Name(name).lower().replace("float", "float32")
    names |= {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    names |= {onnx.TensorProto.BFLOAT16: "bfloat16"}
    for dtype in DTYPES:
        manifest = Bundle.load(bundles / dtype).manifest
        for entry in manifest.graphs:
            graph = onnx.load(bundles / dtype / entry.file, load_external_data=False).graph
            for values, told in ((graph.input, entry.inputs), (graph.output, entry.outputs)):
                assert [(v.name, names[v.type.tensor_type.elem_type]) for v in values] == [
                    (t.name, t.dtype) for t in told
                ]
                assert [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values] == [
                    t.shape for t in told
                ]


@pytest.mark.parametrize("target", [CUDA, TENSORRT, PORTABLE])
def test_scores_are_float32_whatever_the_dtype(bundles, target):
    for dtype in ("float16", "bfloat16"):
        graph = onnx.load(bundles / dtype / f"first_layer.{target}.onnx", load_external_data=False).graph
        inferred = onnx.shape_inference.infer_shapes(onnx.ModelProto(graph=graph, opset_import=_opsets(target)))
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        scoring = [n for n in graph.node if n.name.startswith("hawk/") and n.op_type in ("MatMul", "Gemm", "Mul")]
        assert len(scoring) >= 8
        for node in scoring:
            assert {types.get(name, onnx.TensorProto.FLOAT) for name in node.output} == {onnx.TensorProto.FLOAT}


def test_portable_graphs_use_no_op_newer_than_opset_18_and_no_foreign_domain(bundles):
    newer = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Gelu", "Swish"}
    for file in sorted(bundles.glob("*/*.portable.onnx")):
        model = onnx.load(file, load_external_data=False)
        assert {o.domain: o.version for o in model.opset_import}[""] == 18
        assert model.ir_version == 10
        nodes = [*model.graph.node, *(n for function in model.functions for n in function.node)]
        assert not newer & {node.op_type for node in nodes}
        assert {node.domain for node in model.graph.node} <= {"", "hawk"}


def test_only_the_graphs_of_the_cpu_hold_loops(bundles):
    for file in graph_files(bundles):
        model = onnx.load(file, load_external_data=False)
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        loops = any(entry.type == onnx.AttributeProto.GRAPH for node in nodes for entry in node.attribute)
        assert loops == (file.name == "vision.cpu.onnx"), file


def test_products_of_the_vision_stage_take_their_biases_apart_on_cuda_alone(bundles):
    for target in TARGETS:
        nodes = onnx.load(bundles / "float32" / f"vision.{target}.onnx", load_external_data=False).graph.node
        biased = {node.name for node in nodes if node.op_type == "Gemm" and len(node.input) == 3}
        assert ("blocks.1/attn/proj" in biased) == (target != CUDA), target
        assert target != CUDA or not biased


def test_attention_and_residual_norms_are_single_operators_on_cuda(bundles):
    for dtype, attention in (
        ("float32", "Attention"),
        ("float16", "GroupQueryAttention"),
        ("bfloat16", "GroupQueryAttention"),
    ):
        graph = onnx.load(bundles / dtype / "decoder.cuda.onnx", load_external_data=False).graph
        count = Counter(node.op_type for node in graph.node)
        assert count[attention] == 2, dtype
        assert (count["Transpose"], count["TensorScatter"]) == ((9, 4) if dtype == "float32" else (1, 0))
        for stage in (DECODER, FIRST_LAYER):
            graph = onnx.load(bundles / dtype / f"{stage}.cuda.onnx", load_external_data=False).graph
            count = Counter(node.op_type for node in graph.node)
            # each norm of the residual stream but the first, which is the graph's input
            assert count["RMSNormalization"] == 1, stage
            assert count["SkipSimplifiedLayerNormalization"] == (4 if stage == DECODER else 1)
    for target in (CPU, TENSORRT, PORTABLE):
        model = onnx.load(bundles / "float32" / f"decoder.{target}.onnx", load_external_data=False)
        assert "com.microsoft" not in {entry.domain for entry in model.opset_import}


def test_targets_share_their_weights(bundles):
    folder = bundles / "float32"
    for stage in (DECODER, FIRST_LAYER, "vision"):
        places = []
        for target in TARGETS:
            graph = onnx.load(folder / f"{stage}.{target}.onnx", load_external_data=False).graph
            external = (i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL)
            places.append({i.name: sorted((e.key, e.value) for e in i.external_data) for i in external})
        assert places[0]
        assert all(place == places[0] for place in places)


@pytest.fixture(scope="module")
def torch_layers(tmp_path_factory):
    """transformers' own decoder over the weights of a small checkpoint, and that checkpoint's bundle."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("decoder")
    sizes = Sizes(layers=4)
    checkpoint = make_checkpoint(folder / "checkpoint", random_tensors(sizes, seed=3), sizes=sizes)
    assert export([str(checkpoint), "--out", str(folder / "bundle")]) == 0
    assert export([str(checkpoint), "--out", str(folder / "half"), "--dtype", "float16", "--target", CUDA]) == 0
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return torch, model, folder / "bundle"


@pytest.mark.parametrize(
    ("target", "name", "tolerance"), [*((target, "bundle", 2e-4) for target in TARGETS), (CUDA, "half", 2e-2)]
)
def test_the_decoder_equals_pytorchs_layers_over_prefill_and_decode_steps(torch_layers, target, name, tolerance):
    torch, model, folder = torch_layers
    folder = folder.with_name(name)
    language = model.model.language_model
    config = Bundle.load(folder).manifest.language
    rng = np.random.default_rng(1)
    steps = [9, 1, 1]
    total = sum(steps)
    hidden = rng.normal(size=(2, total, config.hidden_size)).astype(np.float32)
    positions = np.sort(rng.integers(0, 50, (3, 2, total)), axis=-1).astype(np.int64)

    # the reference: all layers but the first, over the whole sequence at once, one row at a time
    expected = []
    with torch.no_grad():
        causal = torch.full((total, total), -torch.inf).triu(1)[None, None]
        for row in range(2):
            x, position_ids = torch.tensor(hidden[row : row + 1]), torch.tensor(positions[:, row : row + 1])
            tables = language.rotary_emb(x, position_ids)
            for layer in language.layers[1:]:
                x = layer(x, attention_mask=causal, position_embeddings=tables)
                x = x[0] if isinstance(x, tuple) else x
            expected.append(model.lm_head(language.norm(x))[0].numpy())

    session = ort.InferenceSession(folder / f"decoder.{target}.onnx")
    caches = {
        value.name: np.zeros(
            (2, config.num_key_value_heads, total if in_place(target) else 0, config.head_dim),
            {"bundle": np.float32, "half": np.float16}[name],
        )
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    done = 0
    for count in steps:
        feeds = {
            "hidden_states": hidden[:, done : done + count],
            "kept_position_ids": positions[:, :, done : done + count],
            **caches,
        }
        if target != CUDA:  # whose rows all begin at the first column
            feeds["kv_start"] = np.zeros(2, np.int64)
        if in_place(target):
            feeds["write_index"] = np.full(2, done, np.int64)
        if target == TENSORRT:
            feeds[CONTEXT_SLOTS] = np.zeros(done + count, np.int64)
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        done += count
        for row in range(2):
            np.testing.assert_allclose(outputs["logits"][row], expected[row][done - 1], rtol=0, atol=tolerance)
            assert outputs["next_token"][row] == outputs["logits"][row].argmax()
        made = {name: outputs[name.replace("past_", "present_")] for name in caches}
        # a portable graph returns the new columns alone
        caches = made if in_place(target) else {n: np.concatenate([caches[n], made[n]], axis=2) for n in caches}


def test_left_padding_changes_nothing_in_the_decoder(torch_layers):
    _, _, folder = torch_layers
    config = Bundle.load(folder).manifest.language
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(1, 6, config.hidden_size)).astype(np.float32)
    positions = np.arange(6).reshape(1, 1, 6).repeat(3, 0)
    session = ort.InferenceSession(folder / "decoder.portable.onnx")
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    caches = {value.name: empty for value in session.get_inputs() if value.name.startswith("past_")}

    def logits(hidden, positions, kv_start):
        feeds = {"hidden_states": hidden, "kept_position_ids": positions, "kv_start": np.array([kv_start]), **caches}
        return session.run(["logits"], feeds)[0]

    padded = np.concatenate([1e3 * rng.normal(size=(1, 3, config.hidden_size)).astype(np.float32), hidden], axis=1)
    padded_positions = np.concatenate([np.zeros((3, 1, 3), np.int64), positions], axis=2)
    np.testing.assert_allclose(logits(padded, padded_positions, 3), logits(hidden, positions, 0), rtol=0, atol=1e-5)
    assert np.abs(logits(padded, padded_positions, 0) - logits(hidden, positions, 0)).max() > 1e-2


def _opsets(target):
    versions = {"": 18 if target == PORTABLE else 24, "hawk": 1, "com.microsoft": 1}
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
