"""The stage contract: which tensors each graph has, of models with and without linear layers."""

import pytest

from export.contract import decoder_entry, first_layer_entry
from hawk_trt.stages import CPU, CUDA, PORTABLE, TARGETS, TENSORRT
from hybrid import HYBRID, PLAIN

DTYPE = "float16"
PROMPT = ["text_embeds", "visual_embeds", "source_rows", "position_ids", "query_weights", "select_bias"]
# what each target takes around its caches: before them, behind them, and their columns as input and output
AROUND = {
    CPU: (["write_index", "kv_start"], [], "cache_len", "cache_len"),
    CUDA: (["write_index"], [], "cache_len", "cache_len"),
    TENSORRT: (["write_index", "kv_start"], ["context_slots"], "cache_len", "cache_len"),
    PORTABLE: (["kv_start"], [], "past_len", "num_kept_total"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_without_linear_layers_has_keys_and_values_alone(target: str) -> None:
    before, behind, columns, written = AROUND[target]
    first, decoder = first_layer_entry(PLAIN, DTYPE, target), decoder_entry(PLAIN, DTYPE, target)
    assert PLAIN.scoring_layer == 0
    assert [spec.name for spec in first.inputs] == [
        *PROMPT, "head_weights", "slots", *before, "past_key.0", "past_value.0", *behind
    ]  # fmt: skip
    made = ["hidden_states", "kept_indices", "kept_position_ids", "scores"]
    assert [spec.name for spec in first.outputs] == [*made, "present_key.0", "present_value.0"]
    caches = ["past_key.1", "past_value.1", "past_key.2", "past_value.2"]
    assert [spec.name for spec in decoder.inputs] == ["hidden_states", "kept_position_ids", *before, *caches, *behind]
    caches = [name.replace("past", "present") for name in caches]
    assert [spec.name for spec in decoder.outputs] == ["logits", "next_token", *caches]
    for stage in (first, decoder):
        inputs = [(spec.dtype, spec.shape) for spec in stage.inputs if "." in spec.name]
        assert set(inputs) == {(DTYPE, ("batch", 2, columns, 16))}
        outputs = [(spec.dtype, spec.shape) for spec in stage.outputs if "." in spec.name]
        assert set(outputs) == {(DTYPE, ("batch", 2, written, 16))}


@pytest.mark.parametrize("target", TARGETS)
def test_a_linear_layer_has_a_convolution_and_a_recurrent_state(target: str) -> None:
    assert HYBRID.scoring_layer == 2
    before, behind, columns, written = AROUND[target]
    first, decoder = first_layer_entry(HYBRID, DTYPE, target), decoder_entry(HYBRID, DTYPE, target)
    caches = ["conv.0", "state.0", "conv.1", "state.1", "key.2", "value.2"]
    assert [spec.name for spec in first.inputs] == [
        *PROMPT, "head_weights", "slots", *before, *(f"past_{name}" for name in caches), *behind
    ]  # fmt: skip
    assert [spec.name for spec in first.outputs][4:] == [f"present_{name}" for name in caches]
    caches = ["conv.3", "state.3", "key.4", "value.4"]
    assert [spec.name for spec in decoder.inputs][2:] == [*before, *(f"past_{name}" for name in caches), *behind]
    assert [spec.name for spec in decoder.outputs][2:] == [f"present_{name}" for name in caches]
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in (*decoder.inputs, *decoder.outputs)}
    for side, length in (("past", columns), ("present", written)):
        # 2 x 2 x 8 channels of queries and keys, 4 x 6 of values
        assert shapes[f"{side}_conv.3"] == ("float32", ("batch", 56, 3))
        assert shapes[f"{side}_state.3"] == ("float32", ("batch", 4, 8, 6))
        assert shapes[f"{side}_key.4"] == (DTYPE, ("batch", 2, length, 16))
