"""NVIDIA's polygraphy finds nothing to say against the graphs.

float32 and float16 alone: numpy has no bfloat16, so polygraphy cannot make inputs for it.
"""

import contextlib
import io
import json
import warnings

import pytest

from engines.profiles import TENSORRT_TARGETS, LargestRequest, plan_profiles
from export.__main__ import main as export
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import PREFILL
from hawk_trt.stages import PORTABLE, STAGES

SIZES = {"max_visual_tokens": 16, "max_prompt_tokens": 32, "max_context": 64}
# Inputs that are indices or positions; in the generated inputs, the first of each.
INDICES = ("source_rows", "window_index", "window_slot", "write_index", "kv_start")


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lint") / "float16"
    assert export([str(tiny_checkpoint), "--out", str(folder), "--dtype", "float16"]) == 0
    return {"float32": Bundle.load(tiny_bundle), "float16": Bundle.load(folder)}


def shapes(bundle, stage, target):
    """The tuned-for shapes of a prefill; a cache of the length that makes them one."""
    limits = LargestRequest(**SIZES).limits(bundle.manifest, plugin=True)
    inputs = bundle.manifest.graph(stage, target).inputs
    static = [
        type(entry)(
            entry.name, entry.dtype, tuple(limits.context if size == "cache_len" else size for size in entry.shape)
        )
        for entry in inputs
    ]
    ranges = plan_profiles(bundle.manifest, stage, static, limits)[PREFILL]
    return {entry.name: entry.opt for entry in ranges}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("target", TENSORRT_TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_polygraphy_finds_no_fault_in_any_graph(bundles, dtype, target, stage, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from polygraphy.tools import main as polygraphy
    bundle = bundles[dtype]
    graph = bundle.folder / bundle.manifest.graph(stage, target).file
    report = tmp_path / "lint.json"
    known = shapes(bundle, stage, target)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = polygraphy(
            ["check", "lint", str(graph), "-o", str(report), "--input-shapes"]
            + [f"{name}:{list(shape)}" for name, shape in known.items()]
            + ["--val-range", *(f"{name}:[0,0]" for name in INDICES if name in known)]
        )
    errors = [entry for entry in json.loads(report.read_text())["lint_entries"] if entry["level"] == "error"]
    assert status == 0 and not errors, printed.getvalue()[-3000:]
    assert target == PORTABLE or stage == "vision" or "write_index" in known
