"""Every exported graph through NVIDIA's real parser and builder, and what the engine builder makes of a refusal.

Fetches NVIDIA's wheels (100 MB) once into the user's cache.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest

from checkpoints import QWEN_7B, make_sparse_checkpoint
from engines.checks.preflight import growth_of, scratch_refusal
from engines.profiles import TENSORRT_TARGETS
from export.__main__ import main as export
from export.random_checkpoint import random_checkpoint
from export.writer import ExportOptions
from export.writer import export as write
from hawk_trt.engine_folder import Limits
from hawk_trt.runtime.versions import available_memory_bytes
from hawk_trt.stages import DTYPES, STAGES
from hybrid import CONFIG
from random_models import IM_END
from released import with_few_layers

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="NVIDIA's builder that needs no GPU exists for x86-64 alone"
)

PLUGIN = os.environ.get("HAWK_PREFLIGHT_PLUGIN")

# Refusals in one process, since each loads the builder anew.
REFUSALS = """
import sys
from dataclasses import replace
import onnx
from engines.checks import gpuless

sys.path.insert(0, str(gpuless.packages()))
from engines.build_plan import BuildSettings
from engines.builder import build_plan
from engines.prepare import prepare
from engines.profiles import plan_profiles
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import Limits
from hawk_trt.errors import BackendError

bundle = Bundle.load(sys.argv[1])

def refused(graph, limits):
    try:
        profiles = plan_profiles(bundle.manifest, graph.stage, graph.inputs, limits)
        build_plan(graph, profiles, BuildSettings(None, 1 << 30, None, ()))
    except BackendError as error:
        print(error)
    else:
        print("built")

small, large = Limits(64, 128, 128, 1), Limits(5000, 6000, 6000, 1)
graph = prepare(bundle, "decoder", "portable", max_context=128, plugin=False)
refused(graph, small)
model = onnx.load_from_string(graph.content)
next(node for node in model.graph.node if node.name.endswith("q_proj")).op_type = "Germ"
refused(replace(graph, content=model.SerializeToString()), small)
refused(prepare(bundle, "first_layer", "portable", max_context=128, plugin=True), small)
refused(prepare(bundle, "first_layer", "portable", max_context=6000, plugin=False), large)
"""

COMMAND = """
import sys
from engines import __main__ as command
from engines.checks import gpuless
from hawk_trt.engine_folder import Machine

sys.path.insert(0, str(gpuless.packages()))
command._machine = lambda tensorrt: (Machine(tensorrt, "13.0", None, "no GPU", "8.7"), None, True)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tmp_path_factory):
    """The tiny model's shapes in float32, float16 and bfloat16, with few layers: more would be more of the same."""
    folder = tmp_path_factory.mktemp("preflight")
    config = with_few_layers(json.loads((tiny_checkpoint / "config.json").read_text()))
    config["text_config"]["num_hidden_layers"] = 3  # of the decoder's scratch, the last layer has little
    checkpoint = random_checkpoint(folder, config | {"eos_token_id": config["text_config"]["eos_token_id"]})
    options = {dtype: ExportOptions(dtype, im_end_token_id=IM_END) for dtype in DTYPES}
    return [write(checkpoint, folder / dtype, options[dtype], name="tiny-vlm").folder for dtype in DTYPES]


def preflight(repository, *arguments):
    command = [sys.executable, "-m", "engines.checks.preflight", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["passed"]
    return report["rows"], done.stderr


def graphs(*dtypes):
    return {f"{dtype} {stage}.{target}.onnx" for dtype in dtypes for stage in STAGES for target in TENSORRT_TARGETS}


def test_every_graph_that_engines_are_built_from_passes_nvidias_parser_and_builder(bundles, repository):
    """Those of float16 are in the next test."""
    rows, told = preflight(repository, bundles[0], bundles[2], "--batch", "2")
    assert {row["graph"] for row in rows} == graphs("float32", "bfloat16")
    assert all(row["layers"] > 100 and row["plan_bytes"] > 1e6 for row in rows)
    assert "with the plugin: not checked" in told


def test_scratch_of_every_stage_grows_with_the_length_since_attention_is_fused(bundles, repository):
    rows, _ = preflight(repository, bundles[1], "--scratch")
    assert {row["graph"] for row in rows} == graphs("float16")
    assert all(row["layers"] > 100 and row["plan_bytes"] > 1e6 for row in rows)
    assert all(len(row["scratch_bytes"]) == 2 and row["growth"] > 0.5 for row in rows)
    # a score tensor of one layer would take 580 MB
    assert all(row["scratch_bytes"][-1] < 100e6 for row in rows)


def test_scratch_that_grows_with_the_square_of_the_length_is_refused():
    size = Limits(4096, 5120, 3840, 1)
    growth = growth_of((148_000_000, 582_000_000))
    assert growth == 1.98
    refusal = scratch_refusal("decoder.portable.onnx", 582_000_000, growth, size)
    assert "to the power of 1.98" in refusal and "582 MB at 5120 tokens" in refusal
    assert scratch_refusal("decoder.portable.onnx", 55_000_000, 1.98, size) is None  # what a mask alone may take
    assert scratch_refusal("decoder.portable.onnx", 582_000_000, 1.2, size) is None
    assert growth_of((582_000_000,)) is None


@pytest.mark.skipif(PLUGIN is None, reason="HAWK_PREFLIGHT_PLUGIN names no top-k plugin built for TensorRT 11")
def test_the_plugin_takes_the_place_of_the_standard_operators(bundles, repository):
    rows, _ = preflight(repository, *bundles, "--plugin", PLUGIN)
    rows = [row for row in rows if row["plugin"]]
    assert len(rows) == 6 and {row["plugin_layers"] for row in rows} == {1}


def test_a_refusal_is_one_message_with_the_node_and_what_helps(bundles, repository):
    command = [sys.executable, "-c", REFUSALS, str(bundles[0])]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    good, unknown, plugin, top_k = done.stdout.splitlines()
    assert good == "built", done.stderr
    assert unknown.startswith("decoder.portable.onnx: TensorRT ") and "self_attn/q_proj (Germ)" in unknown
    assert "first_layer.portable.onnx" in plugin and "hawk/WeightedTopK" in plugin and "(make plugin)" in plugin
    assert "first_layer.portable.onnx: TensorRT " in top_k and "not self-consistent" in top_k


def test_the_whole_command_builds_and_refuses_to_leave_plans_of_another_library(bundles, repository, tmp_path):
    """TensorRT-RTX's plans are not TensorRT's: they are found out before they take their place."""
    out, cache = tmp_path / "engines", tmp_path / "timing.cache"
    options = [str(bundles[0]), "--out", str(out), "--max-visual-tokens", "64", "--no-verify", "--plugin", "none"]
    options += ["--timing-cache", str(cache), "--workspace-gib", "1"]
    command = [sys.executable, "-c", COMMAND, *options]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    begun = [line for line in lines if line.startswith("building ")]
    assert begun == [f"building {stage}.tensorrt.onnx" for stage in STAGES], done.stderr
    refused = "vision.plan: a plan of TensorRT-RTX, expected one of TensorRT. Rebuild: hawk-trt build"
    assert any(refused in line for line in lines), done.stderr
    assert done.returncode == 1 and cache.stat().st_size > 100
    assert [path.name for path in tmp_path.iterdir()] == ["timing.cache"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_of_a_hybrid_model_pass_too(dtype, tmp_path, repository):
    """Each linear layer is some 2,000 of TensorRT's layers, most of them of shapes: half a minute a graph."""
    (tmp_path / "checkpoint").mkdir()
    checkpoint = random_checkpoint(tmp_path / "checkpoint", CONFIG)
    write(checkpoint, tmp_path / "bundle", ExportOptions(dtype, TENSORRT_TARGETS, im_end_token_id=IM_END))
    limits = ("--max-visual-tokens", "256", "--max-prompt-tokens", "512", "--max-context", "512", "--batch", "2")
    rows, _ = preflight(repository, tmp_path / "bundle", *limits)
    assert {row["graph"] for row in rows} == graphs(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "graphs", "needed_bytes"), [("BF16", 6, 8e9), ("F16", 6, 8e9), ("F32", 6, 14e9)])
def test_graphs_of_7b_shapes_pass_too(tmp_path, repository, dtype, graphs, needed_bytes):
    """Two layers of the language model, a windowed and a full block of the tower, the real vocabulary; zero weights."""
    free_bytes = available_memory_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        pytest.skip(f"{free_bytes / 1e9:.1f} GB of memory are free, {needed_bytes / 1e9:.0f} are needed")
    sizes = replace(QWEN_7B, layers=2, vision_depth=2, full_attention=(1,))
    checkpoint = make_sparse_checkpoint(tmp_path / "checkpoint", sizes, dtype=dtype)
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle"), "--dtype", name, "--link"]) == 0
    rows, _ = preflight(repository, tmp_path / "bundle")
    print(*rows, sep="\n")
    assert len(rows) == graphs and max(row["plan_bytes"] for row in rows) > 1e9
