"""The check after a build: it passes what is right and names what is wrong."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from engines.checks.verify import Verification, compare, compared_rows, finite_rows, load_reference, verify
from export.__main__ import main as export
from hawk_trt.bundle import Bundle
from hawk_trt.errors import BackendError, BundleError
from hawk_trt.pipeline import Pipeline
from hawk_trt.runtime.comparison import TOLERANCES
from hawk_trt.runtime.reference import STEPS, Reference, tensor_prompts
from hawk_trt.stages import STAGES
from trt_machine import Machines, engine_folder


@pytest.fixture(scope="module")
def float16(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "float16"
    assert export([str(tiny_checkpoint), "--out", str(folder), "--dtype", "float16", "--target", "portable"]) == 0
    return folder


@pytest.fixture(scope="module")
def reference(tiny_bundle):
    with Pipeline.load(tiny_bundle, target="cpu", threads=1) as pipe:
        return Reference.make(pipe)


@pytest.fixture(scope="module")
def prompts(float16, reference):
    """float16 for the target portable as the plans, float32 for the target cpu as the reference."""
    with Pipeline.load(float16) as plans:
        return [
            compare(plans, name, inputs, reference.prompts[name])
            for name, inputs in tensor_prompts(plans.bundle.manifest).items()
        ]


def rows(prompts, dtype="float16"):
    return {(row.stage, row.output): row for row in compared_rows(prompts, TOLERANCES[dtype])}


def damaged(prompts, **changes):
    """The same prompts, of the first of which something is wrong."""
    first = prompts[0]
    return [replace(first, own=replace(first.own, **changes), forced=replace(first.forced, **changes)), *prompts[1:]]


def test_every_output_of_every_stage_is_compared_and_right(prompts):
    compared = rows(prompts)
    norms = [
        ("first_layer", "KV norms of layer 0"),
        *(("decoder", f"KV norms of layer {layer}") for layer in range(1, 4)),
    ]
    assert set(compared) == {
        ("vision", "visual_embeds"),
        ("first_layer", "scores"),
        ("first_layer", "kept set"),
        ("first_layer", "hidden_states"),
        *norms,
        ("decoder", "logits"),
        ("decoder", "tokens"),
    }
    assert not [row.failures for row in compared.values() if row.failures]
    assert all(row.prompts == len(prompts) for (_, output), row in compared.items() if "KV" in output)
    assert compared["decoder", "tokens"].numbers == f"{len(prompts) * STEPS} of {len(prompts) * STEPS} equal"
    assert not [row.failures for row in finite_rows({p.name: p.own for p in prompts}) if row.failures]


@pytest.mark.parametrize(
    ("output", "place", "error"),
    [
        ("visual_embeds", ("vision", "visual_embeds"), 0.3),
        ("scores", ("first_layer", "scores"), 0.3),
        ("hidden_states", ("first_layer", "hidden_states"), 0.3),
        ("logits", ("decoder", "logits"), 0.5),
    ],
)
def test_a_wrong_stage_is_named_and_only_that_one(prompts, output, place, error):
    random = np.random.default_rng(0)
    values = getattr(prompts[0].own, output)
    wrong = values + error * values.std() * random.standard_normal(values.shape).astype(np.float32)
    failed = {where for where, row in rows(damaged(prompts, **{output: wrong})).items() if row.failures}
    assert failed == {place}


def test_one_layers_wrong_cache_is_named(prompts):
    norms = prompts[0].own.kv_norms.copy()
    norms[2] = norms[2, :, ::-1]
    failed = {where for where, row in rows(damaged(prompts, kv_norms=norms)).items() if row.failures}
    assert failed == {("decoder", "KV norms of layer 2")}


def test_another_token_is_wrong_unless_its_logit_is_as_near_as_the_tolerance_allows(prompts):
    expected = prompts[0].expected
    tokens = expected.tokens.copy()
    order = np.argsort(-expected.logits[3])
    tokens[3] = expected.logit_ids[order[-1]]
    (failure,) = rows(damaged(prompts, tokens=tokens))["decoder", "tokens"].failures
    assert f"step 3: token {tokens[3]}, expected {expected.tokens[3]}" in failure
    tokens[3] = 10**6  # one whose logit the reference does not tell
    assert rows(damaged(prompts, tokens=tokens))["decoder", "tokens"].failures
    tokens[3] = expected.logit_ids[order[1]]
    near = replace(expected, logits=expected.logits.copy())
    near.logits[3, order[1]] = near.logits[3, order[0]] * (1 - 1e-3)
    alike = [replace(damaged(prompts, tokens=tokens)[0], expected=near), *prompts[1:]]
    row = rows(alike)["decoder", "tokens"]
    assert row.numbers.startswith(f"{len(prompts) * STEPS - 1} of") and not row.failures


def test_swaps_far_from_the_cut_fail_and_swaps_at_it_do_not(prompts):
    expected = prompts[0].expected
    order = np.argsort(expected.scores)
    kept = expected.kept.copy()
    kept[order[0]], kept[order[-1]] = True, False
    assert "tokens swapped, up to" in rows(damaged(prompts, kept=kept))["first_layer", "kept set"].failures[0]
    kept[order[0]] = False
    assert (
        "kept 12 visual tokens, expected 13" in rows(damaged(prompts, kept=kept))["first_layer", "kept set"].failures[0]
    )
    last, first = order[-expected.kept.sum()], order[-expected.kept.sum() - 1]
    near = replace(expected, scores=expected.scores.copy())
    near.scores[first] = near.scores[last]
    kept = expected.kept.copy()
    kept[last], kept[first] = False, True
    swapped = [replace(damaged(prompts, kept=kept)[0], expected=near), *prompts[1:]]
    row = rows(swapped)["first_layer", "kept set"]
    assert row.numbers.startswith("1 tokens swapped") and not row.failures


def test_values_that_are_not_finite_or_all_zero_are_found_without_a_reference(prompts):
    norms = prompts[0].own.kv_norms.copy()
    norms[1, 0, 3] = np.nan
    wrong = damaged(prompts, kv_norms=norms, visual_embeds=np.zeros_like(prompts[0].own.visual_embeds))
    told = tuple(finite_rows({p.name: p.own for p in wrong}))
    failures = {row.stage: row.failures for row in told}
    name = prompts[0].name
    assert failures == {
        "vision": (f"{name}: visual_embeds: all values are 0",),
        "first_layer": (),
        "decoder": (f"{name}: KV norms of layer 1: 1 of {norms[1].size} values are not finite",),
    }
    assert Verification(None, "why", told, False).failures == "; ".join(
        f"{stage}: {failure}" for stage, told in failures.items() for failure in told
    )


def with_reference(bundle, reference, out):
    shutil.copytree(bundle, out)
    reference.put_into(out)
    return out


def test_engines_are_compared_with_the_reference_that_their_bundle_brings(float16, reference, tmp_path):
    bundle = with_reference(float16, reference, tmp_path / "bundle")
    own = load_reference(Bundle.load(bundle, verify=True))
    assert own.made_by == "tiny-vlm, float32, onnxruntime on cpu"
    out = engine_folder(bundle, tmp_path / "engines", "portable")
    with Machines():
        found = verify(out, own)
        assert found.passed and found.reference == own.made_by
        assert {row.stage for row in found.rows} == set(STAGES) and len(found.rows) == 3 + 6 + 4
        unknown = verify(out, None)
    assert unknown.passed and len(unknown.rows) == 3 and "numbers were not compared" in unknown.not_compared


def test_prompts_larger_than_the_engines_take_are_left_out(tiny_bundle, reference, tmp_path):
    small = engine_folder(tiny_bundle, tmp_path / "small", "portable", max_visual_tokens=50, max_prompt_tokens=100)
    with Machines():
        found = verify(small, reference)
        assert found.passed and {row.prompts for row in found.rows if row.output == "finite"} == {3}
    least = engine_folder(tiny_bundle, tmp_path / "least", "portable", max_visual_tokens=1, max_prompt_tokens=2)
    with Machines():
        assert "nothing was run" in verify(least, reference).not_compared


@pytest.mark.parametrize(
    ("weight", "wrong"),
    [
        ("visual.blocks.1", "vision: "),
        ("layers.0.self_attn.v_proj", "first_layer: "),
        ("layers.2.mlp.up_proj", "decoder: "),
    ],
)
def test_one_scaled_weight_is_found_and_its_stage_named(tiny_bundle, reference, tmp_path, monkeypatch, weight, wrong):
    """A planted fault: the plans are those of a graph of which one weight is 5 % too large."""
    import tensorrt_standin

    load = onnx.load_external_data_for_model

    def plant(model, folder):
        load(model, folder)
        for place in [t for t in model.graph.initializer if weight in t.name and len(t.dims) == 2][:1]:
            values = onnx.numpy_helper.to_array(place) * np.float32(1.05)
            place.CopyFrom(onnx.numpy_helper.from_array(values, place.name))
            planted.append(place.name)

    planted = []
    monkeypatch.setattr(tensorrt_standin.onnx, "load_external_data_for_model", plant)
    out = engine_folder(tiny_bundle, tmp_path / "engines", "portable")
    assert len(planted) == 1
    with Machines():
        found = verify(out, reference)
    assert not found.passed and found.failures.startswith(wrong)


def test_a_reference_of_another_model_is_refused(tiny_bundle, reference, tmp_path):
    other = replace(reference, model="0" * 64)
    with pytest.raises(BundleError, match=r"made by tiny-vlm.*not tiny-vlm with the same sizes"):
        with_reference(tiny_bundle, other, tmp_path / "bundle")
    (tmp_path / "bundle" / "reference.npz").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"no reference that can be read"):
        Reference.load(tmp_path / "bundle" / "reference.npz")


def test_without_a_reference_and_onnx_runtime_the_check_says_what_it_needs(float16, monkeypatch):
    bundle = Bundle.load(float16)
    monkeypatch.setattr("engines.checks.verify.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"onnxruntime: not installed.*no reference\.npz.*--no-verify"):
        load_reference(bundle)
