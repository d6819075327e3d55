"""The graph that TensorRT gets computes what the bundle's computes; ONNX Runtime runs both."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from checkpoints import Sizes
from engines.build_plan import BuildSettings, plan_build
from engines.prepare import DECOMPOSABLE, PLUGIN_OP, prepare
from engines.profiles import TENSORRT_TARGETS, LargestRequest
from export.writer import ExportOptions, export
from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.stages import BIAS_KEEP, DECODER, FIRST_LAYER, PORTABLE, STAGES, TENSORRT
from quantised_checkpoints import WRITERS, write_quantised
from trt_machine import Machines

CONTEXT = 48
NEW = 5


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    """A copy of the tiny bundle, beside whose weights graphs can be written."""
    folder = tmp_path_factory.mktemp("prepared") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return Bundle.load(folder)


def prepared_model(bundle, stage, target, *, plugin=False):
    return onnx.load_from_string(prepare(bundle, stage, target, max_context=CONTEXT, plugin=plugin).content)


def session(bundle, model):
    """Any graph beside the bundle's weights, without the attribute that only TensorRT knows."""
    for node in model.graph.node:
        for attribute in [entry for entry in node.attribute if entry.name == DECOMPOSABLE]:
            node.attribute.remove(attribute)
    path = bundle.folder / "prepared.onnx"
    onnx.save(model, path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session, feeds):
    names = [value.name for value in session.get_inputs()]
    return dict(
        zip(
            [value.name for value in session.get_outputs()],
            session.run(None, {name: feeds[name] for name in names}),
            strict=True,
        )
    )


def caches(bundle, stage, random):
    """Random in every column, written or not."""
    shapes = {tensor.name: tensor.shape for tensor in bundle.manifest.graph(stage, TENSORRT).inputs}
    cache = {}
    for name in (name for name in shapes if name.startswith("past_")):
        _, heads, _, dim = shapes[name]
        cache[name] = random.standard_normal((2, heads, CONTEXT, dim), dtype=np.float32)
    return cache


def step_feeds(bundle, stage, random, written, seq_len):
    """A prefill (nothing written) or a decode step of two rows."""
    language = bundle.manifest.language
    common = {
        "write_index": np.full(2, written, np.int64),
        "kv_start": np.array([0, 1], np.int64),
        **caches(bundle, stage, random),
    }
    positions = np.broadcast_to(np.arange(written, written + seq_len), (3, 2, seq_len)).astype(np.int64)
    if stage == DECODER:
        hidden = random.standard_normal((2, seq_len, language.hidden_size), dtype=np.float32)
        return {"hidden_states": hidden, "kept_position_ids": positions, **common}
    source_rows = -1 - np.arange(2 * seq_len, dtype=np.int64).reshape(2, seq_len)
    bias = np.full((2, seq_len), BIAS_KEEP, np.float32)
    kept = seq_len
    if seq_len > 4:
        source_rows[:, 1:4], bias[:, 1:4], kept = [0, 1, 2], 0, seq_len - 2
    return {
        "text_embeds": random.standard_normal((2 * seq_len, language.hidden_size), dtype=np.float32),
        "visual_embeds": random.standard_normal((3, language.hidden_size), dtype=np.float32),
        "source_rows": source_rows,
        "position_ids": positions,
        "query_weights": np.full((2, seq_len), 1 / seq_len, np.float32),
        "select_bias": bias,
        "head_weights": np.array(bundle.manifest.head_weights.values, np.float32),
        "slots": np.zeros(kept, np.int64),
        **common,
    }


@pytest.mark.parametrize("stage", [FIRST_LAYER, DECODER])
def test_a_tensorrt_graph_computes_the_same_however_much_of_the_cache_attention_reads(bundle, stage):
    whole = session(bundle, onnx.load(bundle.folder / f"{stage}.cpu.onnx", load_external_data=False))
    prepared = session(bundle, prepared_model(bundle, stage, TENSORRT))
    random = np.random.default_rng(0)
    for written, seq_len in ((0, 12), (12, 1), (17, 1), (CONTEXT - 1, 1), (20, NEW)):
        feeds = step_feeds(bundle, stage, random, written, seq_len)
        expected = run(whole, feeds)
        for context_len in sorted({written + seq_len, min(written + seq_len + 7, CONTEXT), CONTEXT}):
            got = run(prepared, {**feeds, "context_slots": np.zeros(context_len, np.int64)})
            assert got.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-5, err_msg=f"{name} {context_len}")


def test_attention_reads_no_more_of_the_cache_than_context_slots_says(bundle):
    prepared = session(bundle, prepared_model(bundle, DECODER, TENSORRT))
    feeds = step_feeds(bundle, DECODER, np.random.default_rng(1), 12, 1)
    short = {**feeds, "context_slots": np.zeros(13, np.int64)}
    expected = run(prepared, short)["logits"]
    for name in (name for name in feeds if name.startswith("past_")):
        feeds[name][:, :, 13:] = np.nan  # 0 x NaN would show
    np.testing.assert_array_equal(run(prepared, {**short, **feeds})["logits"], expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("target", TENSORRT_TARGETS)
def test_a_prepared_graph_is_valid_onnx_with_the_inputs_and_outputs_that_are_told(bundle, stage, target):
    prepared = prepare(bundle, stage, target, max_context=CONTEXT, plugin=False)
    model = onnx.load_from_string(prepared.content)
    for values, told in ((model.graph.input, prepared.inputs), (model.graph.output, prepared.outputs)):
        shapes = [tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) for value in values]
        assert [value.name for value in values] == [entry.name for entry in told]
        assert shapes == [entry.shape for entry in told]
    session(bundle, model)
    onnx.checker.check_model(bundle.folder / "prepared.onnx", full_check=True)
    attentions = [node for node in onnx.load_from_string(prepared.content).graph.node if node.op_type == "Attention"]
    assert bool(attentions) == (target == TENSORRT)
    assert all(any(entry.name == DECOMPOSABLE and entry.i == 1 for entry in node.attribute) for node in attentions)


def test_cache_outputs_come_straight_from_the_op_that_writes_them(bundle):
    for stage in (FIRST_LAYER, DECODER):
        graph = prepared_model(bundle, stage, TENSORRT).graph
        writers = {output: node.op_type for node in graph.node for output in node.output}
        presents = [value.name for value in graph.output if value.name.startswith("present_")]
        assert presents and {writers[name] for name in presents} == {"TensorScatter"}


def test_with_the_plugin_no_function_body_is_left_to_fall_back_to(bundle):
    for target in TENSORRT_TARGETS:
        with_plugin, without = (prepared_model(bundle, FIRST_LAYER, target, plugin=asked) for asked in (True, False))
        assert not with_plugin.functions
        assert [function.name for function in without.functions] == [PLUGIN_OP]
        assert prepare(bundle, FIRST_LAYER, target, max_context=CONTEXT, plugin=True).has_topk
        assert not prepare(bundle, DECODER, target, max_context=CONTEXT, plugin=True).has_topk


def test_weights_stay_outside_and_are_counted(bundle):
    graph = prepare(bundle, DECODER, PORTABLE, max_context=CONTEXT, plugin=False)
    assert graph.weight_bytes > 20 * len(graph.content)
    assert graph.weight_bytes <= bundle.manifest.files["decoder.data"].size_bytes


def test_float16_attention_adds_up_in_float32_where_tensorrt_fuses_that(bundle):
    half = replace(bundle, manifest=replace(bundle.manifest, dtype="float16"))

    def graph(source, tensorrt):
        prepared = prepare(source, DECODER, TENSORRT, max_context=CONTEXT, plugin=False, tensorrt=tensorrt)
        return onnx.load_from_string(prepared.content).graph

    plain = graph(half, "11.2.0")
    assert plain == graph(half, None) == graph(bundle, "11.3.0")
    made = {output: node for node in graph(half, "11.3.0").node for output in node.output}
    attentions = [node for node in plain.node if node.op_type == "Attention"]
    assert len(attentions) == 3
    for before in attentions:
        back = made[before.output[0]]
        assert (back.op_type, back.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT16)
        attention = made[back.input[0]]
        assert attention.op_type == "Attention" and attention.input[3] == before.input[3]
        casts = [made[name] for name in attention.input[:3]]
        assert [cast.input[0] for cast in casts] == list(before.input[:3])
        assert {cast.attribute[0].i for cast in casts} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(("targets", "first"), [((TENSORRT, PORTABLE), ""), ((TENSORRT,), "export again .* and ")])
def test_fp8_weights_are_refused_before_the_build_below_compute_capability_8_9(tmp_path, targets, first):
    quantised, _ = write_quantised(tmp_path / "checkpoint", WRITERS["float8-rows"], sizes=Sizes(128, 128))
    bundle = export(quantised, tmp_path / "bundle", ExportOptions("float16", targets))
    limits = LargestRequest().limits(bundle.manifest, plugin=False)

    def plan(machine, target):
        return plan_build(bundle, machine, target, limits, BuildSettings(None, None, None, ()), "")

    with Machines() as machines:
        from hawk_trt.runtime.tensorrt.cuda import this_machine

        machines.driver.capability = (8, 7)
        orin = this_machine("10.16.1.11")
    with pytest.raises(
        InvalidInput,
        match=rf"FP8, which begins with compute capability 8\.9; Stand-in has 8\.7\. .* in float16: {first}build with "
        r"--target portable\. .*AWQ",
    ):
        plan(orin, TENSORRT)
    for capability in ("8.9", "9.0", "12.1"):
        assert plan(replace(orin, compute_capability=capability), TENSORRT).graphs[1].has_float8
    if PORTABLE in targets:
        assert not any(graph.has_float8 for graph in plan(orin, PORTABLE).graphs)
