"""make preflight-cuda: the tiny model's graphs in the real CUDA provider over stub libraries, and graphs that go wrong.

Fetches onnxruntime-gpu (250 MB) once into build/.
"""

import platform

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.gpu_report import stub_cuda
from benchmarks.gpu_report.preflight import VERSIONS, Placement, cuda_graphs, main, place
from export.__main__ import main as export
from hawk_trt.errors import BackendError

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="onnxruntime-gpu is on the index for x86-64 alone"
)

NEWEST = VERSIONS[-1]


def save(path, *operators):
    """A graph of float32 operators in a row."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 8]) for name in ("0", str(len(operators)))]
    nodes = [helper.make_node(name, [str(i)], [str(i + 1)]) for i, name in enumerate(operators)]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def save_attention(path, *, masked, columns="cache_len"):
    """Attention in float16: with a mask, or causal over the columns of a KV cache that are written."""
    half, count = TensorProto.FLOAT16, "seq_len"
    shapes = {
        "query": (half, ["batch", 4, count, 64]),
        "past_key.1": (half, ["batch", 2, columns, 64]),
        "mask": (TensorProto.BOOL, ["batch", 1, count, columns]),
        "written": (TensorProto.INT64, ["batch"]),
        "out": (half, ["batch", 4, count, 64]),
    }
    values = {name: helper.make_tensor_value_info(name, *of) for name, of in shapes.items()}
    taken = ["mask"] if masked else ["", "", "", "written"]
    node = helper.make_node(
        "Attention", ["query", "past_key.1", "past_key.1", *taken], ["out"], is_causal=int(not masked)
    )
    inputs = [values[name] for name in ("query", "past_key.1", taken[-1])]
    graph = helper.make_graph([node], "graph", inputs, [values["out"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    return path


@pytest.fixture(scope="module")
def placements(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """Of the tiny model in three dtypes, and of graphs with an operator that has no CUDA kernel, by graph."""
    folder = tmp_path_factory.mktemp("preflight-cuda")
    graphs = cuda_graphs(tiny_bundle)
    for name, options in (("bfloat16", []), ("int4", ["--activations", "float16"])):
        out = folder / f"tiny-{name}"
        assert export([str(tiny_checkpoint), "--out", str(out), "--dtype", name, *options]) == 0
        graphs += cuda_graphs(out)
    graphs += [save(folder / "alone.onnx", "Hardmax"), save(folder / "between.onnx", "Relu", "Hardmax", "Relu")]
    graphs.append(save(folder / "good.onnx", "Relu"))
    graphs += [
        save_attention(folder / f"decoder.{name}.onnx", masked=name == "masked") for name in ("masked", "causal")
    ]
    graphs += [save_attention(folder / f"vision.{columns}.onnx", masked=True, columns=columns) for columns in (64, 63)]
    return {placement.graph: placement for placement in place(graphs, NEWEST)}


def test_every_graph_of_the_tiny_model_stays_on_the_gpu(placements):
    tiny = {name: placement.problem for name, placement in placements.items() if "tiny" in name}
    assert len(tiny) == 9
    assert not any(tiny.values()), tiny
    kernels = {name.split("/")[1]: p.attention for name, p in placements.items() if "bfloat16" in name}
    assert kernels["vision.cuda.onnx"] == {"Flash Attention": 2, "Memory Efficient Attention": 2}
    assert kernels["decoder.cuda.onnx"] == {"Flash Attention": 3}


def test_an_operator_without_a_kernel_is_seen(placements):
    alone, between, good, *_ = (placement for name, placement in placements.items() if "tiny" not in name)
    assert alone.problem == "0 copies, computing on the CPU: {'every operator': 1}"
    assert between.problem == "2 copies, computing on the CPU: {'Hardmax': 1}"
    assert good.problem is None


def test_attention_over_a_cache_that_is_not_flash_attention_is_seen(placements):
    *_, masked, causal, _, _ = placements.values()
    assert masked.problem == "attention: {'Memory Efficient Attention': 1}, expected Flash Attention"
    assert causal.problem is None


def test_attention_of_a_vision_graph_that_keeps_its_scores_is_seen(placements):
    *_, windows, unfused = placements.values()
    assert windows.problem is None
    assert unfused.problem == "attention: {'unfused': 1}, expected Flash Attention or Memory Efficient Attention"


def test_a_provider_that_does_not_start_is_no_pass(tmp_path, monkeypatch):
    site = stub_cuda.wheel_folder(NEWEST)
    monkeypatch.setattr(stub_cuda, "environment", lambda _: {"PYTHONPATH": str(site.resolve())})
    (placement,) = place([save(tmp_path / "good.onnx", "Relu")], NEWEST)
    assert placement.problem == "no session: the CUDA provider did not start"


def test_a_copy_or_an_operator_that_computes_on_the_cpu_is_a_problem():
    assert Placement("graph", None, 0, {"Shape": 3, "Gather": 2}).problem is None
    assert Placement("graph", None, 1, {"Shape": 3}).problem == "1 copies, computing on the CPU: nothing"
    assert Placement("graph", None, 0, {"MatMul": 1}).problem == "0 copies, computing on the CPU: {'MatMul': 1}"
    assert Placement("graph", "no kernel", 0, {}).problem == "no session: no kernel"


def test_a_version_that_is_not_there_is_an_error(tiny_bundle, capsys, monkeypatch):
    def no_wheel(*_):
        raise BackendError("no such version")

    monkeypatch.setattr("benchmarks.gpu_report.stub_cuda.wheel_folder", no_wheel)
    assert main([str(tiny_bundle), "--versions", "0.1"]) == 1
    assert "error: no such version" in capsys.readouterr().err
