"""The ten cases made with the HAWK authors' code, end to end, for every target that runs on the CPU."""

from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest

import golden
from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.stages import CPU, NORMALIZATIONS
from targets import IN_ONNX_RUNTIME


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Gives the pipeline of a normalization and a target, each made once."""
    folder = tmp_path_factory.mktemp("golden")
    for normalization in NORMALIZATIONS:
        out = str(folder / normalization)
        options = ["--im-end-token-id", str(golden.IM_END), "--normalization", normalization]
        assert export([str(golden.MODEL), "--out", out, *options]) == 0
    with ExitStack() as stack:

        @cache
        def load(normalization, target=CPU):
            return stack.enter_context(Pipeline.load(folder / normalization, target=target, threads=1))

        yield load


@pytest.mark.parametrize("target", IN_ONNX_RUNTIME)
@pytest.mark.parametrize("name", golden.CASES)
def test_the_authors_kept_set_scores_logits_and_tokens_are_met(pipeline, name, target):
    case = golden.load_case(name)
    pruning = PruningConfig(
        keep_ratio=case.keep_ratio, head_weights=case.head_weights, min_visual_tokens=case.min_visual_tokens
    )
    result = pipeline(case.normalization, target).generate(
        ModelInputs(**case.inputs), pruning=pruning, max_new_tokens=12, ignore_eos=True, return_logits=True
    )
    assert (result.num_visual, result.num_kept) == (case.num_visual, case.num_kept)
    np.testing.assert_array_equal(result.kept_indices, case.kept_indices)
    assert result.token_ids == case.expected["new_tokens"].reshape(-1).tolist()
    np.testing.assert_allclose(result.logits, case.expected["step_logits"], rtol=0, atol=golden.LOGIT_TOLERANCE)
    assert result.scores.shape == (case.num_visual,)
    if "visual_scores" in case.expected:
        np.testing.assert_allclose(
            result.scores, case.expected["visual_scores"].reshape(-1), rtol=0, atol=golden.SCORE_TOLERANCE
        )


@pytest.mark.parametrize("name", [name for name in golden.CASES if "text_only" not in name])
def test_scores_are_reported_when_nothing_is_pruned(pipeline, name):
    case = golden.load_case(name)
    pipe, inputs = pipeline(case.normalization), ModelInputs(**case.inputs)
    weights = PruningConfig(keep_ratio=1.0, head_weights=case.head_weights)
    full = pipe.generate(inputs, pruning=weights, max_new_tokens=12, ignore_eos=True, return_logits=True)
    pruned = pipe.generate(
        inputs, pruning=PruningConfig(keep_ratio=0.3, head_weights=case.head_weights), max_new_tokens=1
    )
    assert full.num_kept == full.num_visual == case.num_visual
    np.testing.assert_allclose(full.scores, pruned.scores, rtol=0, atol=1e-6)
    assert full.token_ids == case.expected["baseline_new_tokens"].reshape(-1).tolist()
