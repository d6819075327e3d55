"""What the engine inspector tells of attention, in JSON as TensorRT's documentation and its users show it."""

import json

import pytest

from engines.checks.inspection import attention_fusion, inspect
from hawk_trt.engine_folder import EngineFolder
from trt_machine import Machines, engine_folder

INPUT = {"Name": "q", "Dimensions": [1, 28, 64, 128], "Format/Datatype": "Half"}


def layer(name, kind, *nodes, tactic=""):
    told = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "Inputs": [INPUT], "Outputs": [INPUT], "TacticName": tactic,
            "StreamId": 0, "Metadata": told}  # fmt: skip


def attention(number):
    scope = f"layers.{number}/self_attn"
    return [f"{scope}/qk", f"{scope}/masked", f"{scope}/softmax", f"{scope}/av"]


LAYERS = [
    layer("__myl_CastMul_myl0_0", "kgen", "layers.1/self_attn/scale_q", tactic="__myl_CastMul_0x1a"),
    layer("_gemm_mha_v2_myl0_1", "kgen", *attention(1), tactic="_gemm_mha_v2_0x5c"),
    layer("_gemm_mha_v2_myl0_2", "kgen", "layers.2/self_attn/Attention", tactic="_gemm_mha_v2_0x5c"),
    # three kernels in place of one
    layer("layers.3/self_attn/qk_myl0_3", "gemm", *attention(3)[:1], tactic="sm80_xmma_gemm_f16f16_f16f32"),
    layer("__myl_AddResMaxSubExpSumDivMul_myl0_4", "kgen", *attention(3)[1:3], tactic="__myl_AddRes_0x77"),
    layer("layers.3/self_attn/av_myl0_5", "gemm", *attention(3)[3:], tactic="sm80_xmma_gemm_f16f16_f16f32"),
    # the decode profile, where a single token needs no score tensor
    layer("__myl_AddRes_myl1_4 [profile 1]", "kgen", *attention(1)[1:3], tactic="__myl_AddRes_0x77"),
    layer("hawk/softmax_norm_myl0_6", "kgen", "hawk/softmax_norm", tactic="__myl_0x1"),
]


def test_a_fused_kernel_counts_its_attention_and_separate_kernels_count_one():
    fusion = attention_fusion(json.dumps({"Layers": LAYERS, "Bindings": ["q"]}))
    assert (fusion.fused, fusion.decomposed) == (2, 1)
    assert str(fusion) == "attention: 2 fused, 1 decomposed"


def test_a_plan_that_keeps_names_alone_or_nothing_tells_nothing():
    for information in ({"Layers": ["_gemm_mha_v2_myl0_1"], "Bindings": []}, {"Layers": []}, {}):
        assert str(attention_fusion(json.dumps(information))) == "attention: 0 fused, 0 decomposed"


@pytest.fixture
def machines():
    with Machines() as machines:
        yield machines
        assert machines.driver.faults == []


def test_every_plan_of_a_folder_is_inspected_and_released(tiny_bundle, tmp_path, machines):
    folder = engine_folder(tiny_bundle, tmp_path / "engines", "portable")
    machines.driver.current.append(object())  # TensorRT makes a context by itself
    machines.driver.retained = 1
    found = inspect(EngineFolder.load(folder))
    assert {stage: (fusion.fused, fusion.decomposed) for stage, fusion in found.items()} == {
        "vision": (0, 10),  # one block attends over windows, the other over the frame in parts
        "first_layer": (0, 1),
        "decoder": (0, 3),
    }
    assert not list(machines.trt.objects)
