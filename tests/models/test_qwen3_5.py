"""What Qwen3.5 has of its own: linear layers, layers that draft, norms of 1 + weight."""

import json
from dataclasses import replace

import numpy as np
import pytest

from checkpoints import write_safetensors
from export.__main__ import main as export
from export.architectures import family_name, read_config
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError
from hawk_trt.models.vision_config import Qwen35Vision
from hawk_trt.runtime.comparison import TOLERANCES, StageTolerance, tolerance_of
from hawk_trt.stages import CPU, FULL_ATTENTION, LINEAR_ATTENTION, PORTABLE, TARGETS, LinearAttentionConfig
from quantised_checkpoints import WRITERS
from qwen import QWEN3_5_08B, QWEN3_5_27B, QWENS, STEPS, TOKENS, random_qwen3_5, run
from random_models import IM_END_OPTION, generate, prompt, save_random
from targets import IN_ONNX_RUNTIME

pytest.importorskip("torch")
pytest.importorskip("transformers")
from hawk_trt.apps.parity.reference import Reference

_DECAY = ("in_proj_a.weight", "in_proj_b.weight")
# By their writers' names; the target that runs them here, and what else than projections they quantise.
KINDS = {
    **{"awq-32": (CPU, ()), "gptq-desc-act": (PORTABLE, ()), "gptq-int8": (CPU, ())},
    **{"packed-int4-zeros": (PORTABLE, ()), "int8-rows": (PORTABLE, ())},
    **{"float8-rows": (CPU, _DECAY), "float8-tensor": (PORTABLE, ()), "float8-blocks": (CPU, ())},
}
IMAGE = {"patch_dim": QWENS["qwen3_5"].patch_dim, "images": [(1, 8, 12)]}


@pytest.fixture(scope="module")
def qwen(random_qwen):
    return random_qwen("qwen3_5")


@pytest.fixture(scope="module")
def answer(qwen):
    """Of the float32 bundle, with 30 % of an image kept."""
    with Pipeline.load(qwen.bundle, threads=1) as pipe:
        return run(pipe, prompt(**IMAGE), 0.3)


@pytest.mark.parametrize(
    ("config", "layers", "value_heads", "tower"), [(QWEN3_5_08B, 24, 16, 768), (QWEN3_5_27B, 64, 48, 1152)]
)
def test_the_released_configs_are_read(config, layers, value_heads, tower):
    model = read_config(config)
    language, vision = model.language, model.vision
    assert language.layer_types == ((LINEAR_ATTENTION,) * 3 + (FULL_ATTENTION,)) * (layers // 4)
    assert (language.scoring_layer, language.first_layers) == (3, range(4))
    assert language.linear == LinearAttentionConfig(16, value_heads, 128, 128, 4)
    assert (language.head_dim, language.rotary_dim, language.mrope_section) == (256, 64, (11, 11, 10))
    assert language.mrope_interleaved and language.attention_gate and language.qk_norm and language.unit_offset_norms
    assert type(vision) is Qwen35Vision and vision.deepstack_visual_indexes == ()
    assert (vision.family, vision.hidden_size) == ("qwen3_5", tower)


def test_the_kinds_of_layers_follow_from_the_interval_where_they_are_not_listed():
    listed = QWEN3_5_08B["text_config"] | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6}
    assert read_config(QWEN3_5_08B | {"text_config": listed}) == read_config(QWEN3_5_08B)


@pytest.mark.parametrize(
    ("name", "words"), [("Qwen3_5MoeForConditionalGeneration", "mixtures of experts"), ("Qwen3_5ForCausalLM", "tower")]
)
def test_relatives_are_refused_by_name(name, words):
    with pytest.raises(CheckpointError, match=f"{name}.*{words}"):
        family_name(QWEN3_5_08B | {"architectures": [name]})


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("text_config", {"layer_types": ["linear_attention"] * 23 + ["full_attention"]}, "two of full_attention"),
        ("text_config", {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ("text_config", {"layer_types": ["full_attention"] * 23}, "each of 24 layers"),
        ("text_config", {"attn_output_gate": False}, "attn_output_gate"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"linear_num_value_heads": 24}, "a multiple of linear_num_key_heads 16"),
        ("text_config", {"linear_key_head_dim": 0}, "linear_key_head_dim"),
        ("text_config", {"linear_conv_kernel_dim": 1}, "at least 2"),
        (
            "text_config",
            {"rope_parameters": QWEN3_5_08B["text_config"]["rope_parameters"] | {"partial_rotary_factor": 0.5}},
            "add up to head_dim / 2 = 64",
        ),
        (
            "text_config",
            {"rope_parameters": QWEN3_5_08B["text_config"]["rope_parameters"] | {"partial_rotary_factor": 1.5}},
            "partial_rotary_factor",
        ),
        ("vision_config", {"deepstack_visual_indexes": [5]}, "deepstack_visual_indexes"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(section, changes, words):
    config = QWEN3_5_08B | {section: QWEN3_5_08B[section] | changes}
    with pytest.raises(CheckpointError, match=words):
        read_config(config)


def test_the_last_token_asks_as_in_transformers(qwen):
    inputs, pruning = prompt(**IMAGE), PruningConfig(keep_ratio=0.3, query="last")
    expected = qwen.reference.run(qwen.reference.embed(inputs, TOKENS), pruning)
    with Pipeline.load(qwen.bundle, threads=1) as pipe:
        last, paper = (pipe.generate(inputs, pruning=replace(pruning, query=query)) for query in ("last", "paper"))
    assert expected.query_indices.tolist() == [np.size(inputs.input_ids) - 1]
    np.testing.assert_array_equal(last.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(last.scores, expected.scores, rtol=0, atol=1e-5)
    assert not np.array_equal(last.kept_indices, paper.kept_indices)


def test_a_bundle_holds_all_targets_and_the_query_to_try_is_told(qwen, tmp_path, capsys):
    command = [str(qwen.checkpoint), "--out", str(tmp_path / "bundle"), "--no-reference", *IM_END_OPTION]
    assert export(command) == 0
    assert capsys.readouterr().err.count("--query last") == 1
    assert Bundle.load(tmp_path / "bundle").manifest.targets == TARGETS


def test_layers_that_draft_tokens_are_left_out_and_said(qwen, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "checkpoint"
    source.mkdir()
    (source / "config.json").write_bytes((qwen.checkpoint / "config.json").read_bytes())
    tensors = load_file(qwen.checkpoint / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": np.ones((64, 128), np.float32)}, source / "model.safetensors")
    assert export([str(source), "--out", str(tmp_path / "bundle"), "--no-reference", *IM_END_OPTION]) == 0
    assert "mtp.fc.weight: layers that draft later tokens, which are left out" in capsys.readouterr().err


def test_linked_weights_give_the_same_answer(qwen, answer, tmp_path):
    """The 1 of 1 + weight is a node, so the norms' weights are the checkpoint's own."""
    out = tmp_path / "linked"
    assert export([str(qwen.checkpoint), "--out", str(out), "--link", "--no-reference", *IM_END_OPTION]) == 0
    with Pipeline.load(out, threads=1) as pipe:
        got = run(pipe, prompt(**IMAGE), 0.3)
    assert got.token_ids == answer.token_ids
    np.testing.assert_array_equal(got.logits, answer.logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_keep_the_decay_in_floats(qwen, answer, tmp_path, bits):
    """Layers before the scoring layer are quantised too, so other tokens may be kept, but few."""
    import onnx

    out = tmp_path / "quantised"
    options = ["--dtype", f"int{bits}", "--block-size", "32", "--target", "cpu", *IM_END_OPTION]
    assert export([str(qwen.checkpoint), "--out", str(out), *options]) == 0
    graphs = [
        onnx.load(out / f"{stage}.cpu.onnx", load_external_data=False).graph for stage in ("first_layer", "decoder")
    ]
    names = {value.name for graph in graphs for value in graph.initializer}
    for layer in (0, 4):
        linear = f"language_model.layers.{layer}.linear_attn"
        assert {f"{linear}.{name}.weight" for name in ("in_proj_a", "in_proj_b", "conv1d")} <= names
        assert {f"{linear}.{name}.weight/integers" for name in ("in_proj_qkv", "in_proj_z", "out_proj")} <= names
    scoring = "language_model.layers.3.self_attn"
    assert {f"{scoring}.q_proj.weight", f"{scoring}.k_proj.weight", f"{scoring}.v_proj.weight/integers"} <= names
    with Pipeline.load(out, threads=1) as pipe:
        got = run(pipe, prompt(**IMAGE), 0.3)
    assert np.isfinite(got.logits).all()
    if bits == 8:
        assert np.isin(got.kept_indices, answer.kept_indices).mean() > 0.9
        assert np.corrcoef(got.logits[0], answer.logits[0])[0, 1] > 0.95  # 0.98 seen


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_answers_as_the_floats_that_it_stands_for_in_pytorch(qwen, kind, tmp_path):
    """Its scoring projections become floats; those of the layers before, and of the decoder, stay integers."""
    from safetensors.numpy import load_file, save_file

    writer, parts, floats = WRITERS[kind], {}, {}
    # FP8 of any number of rows; of integers the few rows of the decay stay floats, as their writers leave them
    target, others = KINDS[kind]
    ends = (*others, "_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")
    for name, array in load_file(qwen.checkpoint / "model.safetensors").items():
        parts[name] = floats[name] = array
        if ".layers." in name and name.endswith(ends):
            written = writer.write(parts.pop(name))
            floats[name] = written.floats
            parts |= {f"{name.removesuffix('weight')}{part}": value for part, value in written.parts.items()}
    config = json.loads((qwen.checkpoint / "config.json").read_text(encoding="utf-8"))
    source, plain, out = (tmp_path / name for name in (kind, "plain", "bundle"))
    for folder, settings in ((source, {"quantization_config": writer.settings}), (plain, {})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    write_safetensors(source / "model.safetensors", parts)
    contiguous = {name: np.ascontiguousarray(array) for name, array in floats.items()}
    save_file(contiguous, plain / "model.safetensors", {"format": "pt"})
    inputs = prompt(**IMAGE)
    expected = type(qwen.model).from_pretrained(plain, dtype="float32").eval()
    tokens, logits = generate(expected, inputs, STEPS)
    assert export([str(source), "--out", str(out), "--target", target, "--no-reference", *IM_END_OPTION]) == 0
    with Pipeline.load(out, threads=1) as pipe:
        whole, pruned = run(pipe, inputs, 1.0), run(pipe, inputs, 0.3)
    assert whole.token_ids == tokens
    np.testing.assert_allclose(whole.logits, logits, rtol=0, atol=1e-3)
    hawk = Reference.load(plain, head_weights=(0.25,) * 4, normalization="l2")
    kept = hawk.run(hawk.embed(inputs, TOKENS), PruningConfig(keep_ratio=0.3), steps=STEPS)
    np.testing.assert_array_equal(pruned.kept_indices, kept.kept_indices)
    np.testing.assert_allclose(pruned.logits, kept.logits, rtol=0, atol=1e-3)


def test_a_model_may_score_in_layer_1_and_end_with_a_linear_layer(tmp_path):
    kinds = [LINEAR_ATTENTION, FULL_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION]
    model, inputs = random_qwen3_5(kinds), prompt(**IMAGE)
    checkpoint = save_random(model, tmp_path / "checkpoint", 2)
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle"), "--no-reference", *IM_END_OPTION]) == 0
    tokens, logits = generate(model, inputs, 5)
    for target in IN_ONNX_RUNTIME:
        with Pipeline.load(tmp_path / "bundle", target=target, threads=1) as pipe:
            got = run(pipe, inputs, 1.0)
        assert got.token_ids == tokens
        np.testing.assert_allclose(got.logits, logits, rtol=0, atol=1e-3)


def test_parity_allows_what_the_layers_before_the_scores_round(qwen):
    manifest = Bundle.load(qwen.bundle).manifest
    alike = replace(manifest, language=replace(manifest.language, linear=None, layer_types=()))
    hybrid, plain = tolerance_of(manifest), tolerance_of(alike)
    assert plain == TOLERANCES["float32"]
    assert hybrid.scores == hybrid.first_layer == StageTolerance(1 - 4 * (1 - plain.first_layer.cosine), 2e-4, 2e-4)
    assert (hybrid.decoder, hybrid.vision, hybrid.score_error) == (plain.decoder, plain.vision, 5e-5)


def test_the_manifest_holds_the_sizes_of_linear_layers(qwen):
    manifest = json.loads((qwen.bundle / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["language"]["linear"]["num_value_heads"] == 4
    assert Bundle.load(qwen.bundle).manifest.language.linear == LinearAttentionConfig(2, 4, 8, 16, 4)
