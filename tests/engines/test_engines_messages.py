"""What TensorRT says, as one message that helps; and the switches for its known miscompiles."""

import os

import pytest

from engines.messages import LogLine, ParserFault, builder_message, parser_message
from engines.workarounds import WORKAROUNDS, applied, workarounds_for


def test_a_parser_error_names_the_file_the_node_the_reason_and_what_helps():
    fault = ParserFault(
        "layers.0/self_attn/Attention", "Attention", "No importer registered for op: Attention. Attempting plugin."
    )
    text = parser_message("first_layer.tensorrt.onnx", "10.3.0", [fault], [])
    assert text == (
        "first_layer.tensorrt.onnx: TensorRT 10.3.0 cannot parse it. Node layers.0/self_attn/Attention (Attention): "
        "No importer registered for op: Attention. Attempting plugin. Use the target portable, which has none of "
        "these ops: --target portable"
    )


def test_a_missing_plugin_says_how_to_build_it():
    text = parser_message("a.onnx", "10.16", [ParserFault("hawk/WeightedTopK", "WeightedTopK", "Plugin not found")], [])
    assert "(make plugin), or build without it (--plugin none)" in text


def test_many_parser_errors_become_three_and_a_count():
    faults = [ParserFault(f"n{number}", "Add", f"bad {number}") for number in range(5)]
    text = parser_message("a.onnx", "11.4", faults, [])
    assert "n0" in text and "n2" in text and "n3" not in text and "(and 2 more)" in text


def test_without_parser_errors_the_log_tells():
    log = [LogLine("WARNING", "weights are large"), LogLine("ERROR", "ModelImporter.cpp:829: Failed to open weights")]
    assert "Failed to open weights." in parser_message("a.onnx", "11.4", [], log)
    assert "TensorRT gave no reason." in parser_message("a.onnx", "11.4", [], [])


def test_a_builder_error_loses_its_code_and_source_line_and_names_the_node():
    log = [
        LogLine("WARNING", "something harmless"),
        LogLine(
            "INTERNAL_ERROR",
            "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for "
            "node {ForeignNode[layers.3/self_attn/q_proj...layers.3/mlp/down_proj]}.)",
        ),
    ]
    names = ["layers.3/self_attn/q", "layers.3/self_attn/q_proj", "layers.3/self_attn/k_proj"]
    text = builder_message("decoder.portable.onnx", "10.3.0", log, names)
    assert text.startswith(
        "decoder.portable.onnx: TensorRT 10.3.0 cannot build it. Node layers.3/self_attn/q_proj: "
        "Internal Error (Could not find any implementation for node"
    )
    assert "harmless" not in text and "Error Code" not in text


def test_too_little_memory_says_what_makes_engines_smaller():
    log = [
        LogLine("ERROR", "[a/tactic.cpp::search::12] Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)")
    ]
    text = builder_message("decoder.onnx", "10.3.0", log, [])
    assert "cannot build it. OutOfMemory (Requested size was 8589934592 bytes.). Free memory" in text
    assert "--max-context" in text


def test_a_profile_beyond_a_limit_is_an_error_though_tensorrt_only_warns():
    line = LogLine("WARNING", "Profile 0: kMAX is not self-consistent: K exceeds 3840")
    assert line.is_error
    assert "K exceeds 3840" in builder_message("first_layer.onnx", "10.3.0", [line], [])


@pytest.mark.parametrize(
    ("tensorrt", "batch", "names"),
    [
        ("10.3.0", 1, []),
        ("10.12.0.36", 1, []),
        ("10.13.3.9", 1, ["no_dual_gemm", "no_horizontal_fusion"]),
        ("10.14.1", 4, ["no_dual_gemm"]),
        ("10.16.1.11", 1, ["no_horizontal_fusion"]),
        ("11.4.0.106", 2, []),
    ],
)
def test_workarounds_are_on_for_the_versions_and_batches_that_need_them(tensorrt, batch, names, monkeypatch):
    monkeypatch.delenv("HAWK_NO_WORKAROUNDS", raising=False)
    assert [entry.name for entry in workarounds_for(tensorrt, batch)] == names
    monkeypatch.setenv("HAWK_NO_WORKAROUNDS", "1")
    assert workarounds_for(tensorrt, batch) == ()


def test_switches_are_set_beside_the_users_own_and_taken_back(monkeypatch):
    monkeypatch.setenv("__LUNOWUD", "-own:thing=1 -peep:fc_h_fusion=off")
    with applied(WORKAROUNDS):
        assert os.environ["__LUNOWUD"].split() == [
            "-own:thing=1",
            "-peep:fc_h_fusion=off",
            "-peep:match_dual_gemm=off",
        ]
    assert os.environ["__LUNOWUD"] == "-own:thing=1 -peep:fc_h_fusion=off"
    monkeypatch.delenv("__LUNOWUD")
    with applied(WORKAROUNDS):
        assert "match_dual_gemm" in os.environ["__LUNOWUD"]
    assert "__LUNOWUD" not in os.environ
    with applied(()):
        assert "__LUNOWUD" not in os.environ
