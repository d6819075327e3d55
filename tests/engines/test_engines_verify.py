"""The check after a build, with ONNX Runtime on both sides: it passes what is right and names what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from engines.stage_trace import STEPS, trace
from engines.verify import Verification
from engines.verify_rows import Compared, compared_rows, finite_rows
from export.__main__ import main as export
from hawk_trt.apps.parity.cases import tensor_cases
from hawk_trt.apps.parity.tolerances import TOLERANCES
from hawk_trt.pipeline import Pipeline


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """float16 in the portable profile as the plans, float32 in the inplace profile as the reference."""
    folder = tmp_path_factory.mktemp("verify") / "float16"
    assert export([str(tiny_checkpoint), "--out", str(folder), "--dtype", "float16", "--profile", "portable"]) == 0
    compared = []
    with Pipeline.load(folder) as plans, Pipeline.load(tiny_bundle, profile="inplace") as reference:
        for case in tensor_cases(plans.bundle.manifest, 0):
            got = trace(plans, case.inputs, None)
            own = trace(reference, case.inputs, got.tokens)
            forced = trace(reference, case.inputs, got.tokens, got.kept)
            compared.append(Compared(case.name, got, own, forced))
    return compared


def rows(prompts, dtype="float16"):
    return {(row.stage, row.output): row for row in compared_rows(prompts, TOLERANCES[dtype])}


def damaged(prompts, **changes):
    """The same prompts, of the first of which something is wrong."""
    return [replace(prompts[0], got=replace(prompts[0].got, **changes)), *prompts[1:]]


def test_every_output_of_every_stage_is_compared_and_right(prompts):
    compared = rows(prompts)
    layers = [("first_layer", "KV of layer 0"), *(("decoder", f"KV of layer {layer}") for layer in range(1, 4))]
    assert set(compared) == {
        ("vision", "visual_embeds"),
        ("first_layer", "scores"),
        ("first_layer", "kept set"),
        ("first_layer", "hidden_states"),
        *layers,
        ("decoder", "logits"),
        ("decoder", "tokens"),
    }
    assert not [row.failures for row in compared.values() if row.failures]
    assert compared["decoder", "tokens"].numbers == f"{len(prompts) * STEPS} of {len(prompts) * STEPS} equal"
    assert not [row.failures for row in finite_rows([(p.name, p.got) for p in prompts]) if row.failures]


def test_a_trace_can_be_forced_to_a_choice_of_visual_tokens(prompts, tiny_bundle):
    with Pipeline.load(tiny_bundle) as pipe:
        inputs = tensor_cases(pipe.bundle.manifest, 0)[0].inputs
        chosen = np.zeros(len(prompts[0].got.kept), np.bool_)
        chosen[: prompts[0].got.kept.sum()] = True
        np.testing.assert_array_equal(trace(pipe, inputs, None, chosen).kept, chosen)


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
    values = getattr(prompts[0].got, output)
    wrong = values + error * values.std() * random.standard_normal(values.shape).astype(np.float32)
    failed = {where for where, row in rows(damaged(prompts, **{output: wrong})).items() if row.failures}
    assert place in failed and failed <= {place, ("decoder", "tokens")}


def test_one_layers_wrong_cache_is_named(prompts):
    caches = list(prompts[0].got.caches)
    caches[2] = caches[2][:, ::-1]
    failed = {where for where, row in rows(damaged(prompts, caches=tuple(caches))).items() if row.failures}
    assert failed == {("decoder", "KV of layer 2")}


def test_swaps_far_from_the_cut_fail_and_swaps_at_it_do_not(prompts):
    own = prompts[0].own
    order = np.argsort(own.scores)
    kept = own.kept.copy()
    kept[order[0]], kept[order[-1]] = True, False
    assert "tokens swapped, up to" in rows(damaged(prompts, kept=kept))["first_layer", "kept set"].failures[0]
    kept[order[0]] = False
    assert (
        "kept 12 visual tokens, expected 13" in rows(damaged(prompts, kept=kept))["first_layer", "kept set"].failures[0]
    )
    last, first = order[-own.kept.sum()], order[-own.kept.sum() - 1]
    near = replace(own, scores=own.scores.copy())
    near.scores[first] = near.scores[last]
    kept = own.kept.copy()
    kept[last], kept[first] = False, True
    swapped = [replace(prompts[0], own=near, got=replace(prompts[0].got, kept=kept)), *prompts[1:]]
    row = rows(swapped)["first_layer", "kept set"]
    assert row.numbers.startswith("1 tokens swapped") and not row.failures


def test_values_that_are_not_finite_or_all_zero_are_found_without_a_reference(prompts):
    caches = list(prompts[0].got.caches)
    caches[1] = caches[1].copy()
    caches[1][0, 3] = np.nan
    wrong = damaged(prompts, caches=tuple(caches), visual_embeds=np.zeros_like(prompts[0].got.visual_embeds))
    failures = {row.stage: row.failures for row in finite_rows([(p.name, p.got) for p in wrong])}
    name = prompts[0].name
    assert failures == {
        "vision": (f"{name}: visual_embeds: all values are 0",),
        "first_layer": (),
        "decoder": (f"{name}: KV of layer 1: 1 of {caches[1].size} values are not finite",),
    }
    verification = Verification(None, "why", tuple(finite_rows([(p.name, p.got) for p in wrong])), False)
    assert verification.failures == "; ".join(
        f"{stage}: {failure}" for stage, told in failures.items() for failure in told
    )
