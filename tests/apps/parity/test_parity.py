"""The comparison itself: it must see what is wrong, and only that. Stage outputs here are made up."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from hawk_trt.apps.cli.output import print_json
from hawk_trt.apps.parity.compare import ReferenceTrace, compare_selection, compare_tokens, rank_correlation
from hawk_trt.apps.parity.report import CaseReport, ParityReport, told
from hawk_trt.runtime.comparison import TOLERANCES, StageTolerance, compare_stage
from hawk_trt.runtime.trace import Trace

LOOSE = StageTolerance(cosine=0.99, norm_ratio=0.02, max_error=0.05)
FLOAT32 = TOLERANCES["float32"]
FLOAT16 = TOLERANCES["float16"]
VISUAL = np.arange(3, 23)  # of 28 positions


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def rows(rng):
    return rng.standard_normal((16, 64))


def reference_trace(rng, groups=None):
    """20 visual tokens between text, 8 kept: with groups the 4 best of each half, else the 8 best."""
    scores = rng.permutation(np.linspace(-0.3, 0.7, 20)).astype(np.float32)
    groups = np.zeros(20, dtype=np.int64) if groups is None else groups
    kept = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        kept += members[np.argsort(-scores[members])][: 8 // len(np.unique(groups))].tolist()
    kept_visual = np.sort(np.array(kept))
    kept_indices = np.sort(np.concatenate([np.setdiff1d(np.arange(28), VISUAL), VISUAL[kept_visual]]))
    logits = rng.standard_normal((4, 50)).astype(np.float32) * 5
    return ReferenceTrace(
        visual_embeds=rng.standard_normal((20, 64)).astype(np.float32),
        inputs_embeds=rng.standard_normal((28, 64)).astype(np.float32),
        head_scores=rng.standard_normal((4, 20)).astype(np.float32),
        scores=scores,
        visual_indices=VISUAL,
        topk_groups=groups,
        kept_visual=kept_visual,
        kept_indices=kept_indices,
        query_indices=np.array([24, 25]),
        hidden_states=rng.standard_normal((16, 64)).astype(np.float32),
        position_ids=np.tile(np.arange(28), (3, 1)),
        kept_position_ids=np.tile(kept_indices, (3, 1)),
        logits=logits,
        tokens=tuple(logits.argmax(1).tolist()),
    )


def same(reference):
    """The trace of a bundle that does just what the reference does."""
    return Trace(
        visual_embeds=reference.visual_embeds,
        scores=reference.scores,
        kept=np.isin(reference.visual_indices, reference.kept_indices),
        kept_indices=reference.kept_indices,
        hidden_states=reference.hidden_states,
        kv_norms=np.ones((2, 2, 16), np.float32),  # no row of parity
        tokens=reference.logits.argmax(1),
        logits=reference.logits,
        logit_ids=np.arange(reference.logits.shape[1]),
    )


def swap(reference, kept_rank, dropped_rank):
    """kept_indices with a kept token (0: the last kept one) swapped for a dropped one (0: the first dropped)."""
    order = np.argsort(-reference.scores)
    lost, won = order[7 - kept_rank], order[8 + dropped_rank]
    kept = np.setdiff1d(reference.kept_indices, [VISUAL[lost]])
    return np.sort(np.append(kept, VISUAL[won]))


class TestStage:
    def test_equal_rows_pass(self, rows):
        row = compare_stage("vision", rows, rows, LOOSE)
        assert row.failures == ()
        assert (row.cosine_min, row.norm_ratio_worst, row.max_error) == (pytest.approx(1), pytest.approx(1), 0.0)

    def test_a_scaled_copy_fails_though_its_cosine_is_one(self, rows):
        row = compare_stage("vision", 1.5 * rows, rows, replace(LOOSE, max_error=1.0))
        assert row.cosine_min == pytest.approx(1)
        assert row.norm_ratio_worst == pytest.approx(1.5)
        assert len(row.failures) == 1 and "norm ratio" in row.failures[0]

    def test_permuted_rows_fail_though_their_norms_are_right(self, rows):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        row = compare_stage("first_layer", np.roll(units, 1, axis=0), units, replace(LOOSE, max_error=2.0))
        assert len(row.failures) == 1 and "cosine" in row.failures[0]

    def test_one_wrong_row_of_many_fails(self, rows):
        wrong = np.tile(rows, (100, 1))
        expected = wrong.copy()
        wrong[777] = -wrong[777]
        row = compare_stage("vision", wrong, expected, LOOSE)
        assert row.cosine > 0.99 and row.cosine_min == pytest.approx(-1) and row.failures

    def test_one_wrong_value_of_a_long_row_fails(self, rng):
        expected = rng.standard_normal((1, 100_000))
        wrong = expected.copy()
        wrong[0, 5] += 2.0
        row = compare_stage("decoder", wrong, expected, LOOSE)
        assert row.cosine_min > 0.9999 and len(row.failures) == 1 and "max error" in row.failures[0]

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_fails(self, rows, value):
        wrong = rows.copy()
        wrong[3, 3] = value
        assert compare_stage("decoder", wrong, rows, LOOSE).failures

    def test_a_row_that_should_be_zero_fails_and_two_zero_rows_pass(self, rows):
        expected = rows.copy()
        expected[2] = 0.0
        assert compare_stage("vision", expected, expected, LOOSE).failures == ()
        assert compare_stage("vision", rows, expected, LOOSE).failures
        assert compare_stage("vision", expected, rows, LOOSE).failures

    def test_another_shape_fails(self, rows):
        assert "shape" in compare_stage("vision", rows[:-1], rows, LOOSE).failures[0]

    def test_an_error_counts_relative_to_the_largest_value(self, rows):
        small = compare_stage("vision", rows * 1e4 + 1.0, rows * 1e4, LOOSE)
        large = compare_stage("vision", rows * 1e-4 + 1e-4, rows * 1e-4, LOOSE)
        assert small.failures == () and large.failures


class TestSelection:
    def test_the_same_set_passes_and_reports_the_margin(self, rng):
        reference = reference_trace(rng)
        row = compare_selection(same(reference), reference, FLOAT32)
        assert row.failures == ()
        assert (row.num_visual, row.num_kept, row.overlap, row.swap_distance) == (20, 8, 1.0, 0.0)
        assert row.margin == pytest.approx(1 / 19, abs=1e-6)
        assert row.rank_correlation == 1.0

    def test_a_swap_at_the_cut_passes_only_within_the_score_error(self, rng):
        reference = reference_trace(rng)
        swapped = replace(same(reference), kept_indices=swap(reference, 0, 0))
        assert compare_selection(swapped, reference, FLOAT32).failures
        # both lie half of 1/19 from the cut
        assert compare_selection(swapped, reference, replace(FLOAT32, score_error=0.03)).failures == ()
        row = compare_selection(swapped, reference, replace(FLOAT32, score_error=0.02))
        assert row.overlap == 7 / 8
        assert row.swap_distance == pytest.approx(0.5 / 19, abs=1e-6)
        assert len(row.failures) == 1 and "cut" in row.failures[0]

    @pytest.mark.parametrize(("kept_rank", "dropped_rank"), [(0, 5), (5, 0)])
    def test_a_swap_of_which_one_token_is_far_from_the_cut_fails(self, rng, kept_rank, dropped_rank):
        reference = reference_trace(rng)
        swapped = replace(same(reference), kept_indices=swap(reference, kept_rank, dropped_rank))
        assert compare_selection(swapped, reference, replace(FLOAT32, score_error=0.05)).failures

    def test_a_token_too_many_or_too_few_fails(self, rng):
        reference = reference_trace(rng)
        dropped = np.setdiff1d(VISUAL, reference.kept_indices)[:1]
        more = np.union1d(reference.kept_indices, dropped)
        fewer = np.setdiff1d(reference.kept_indices, VISUAL[reference.kept_visual[:1]])
        for kept in (more, fewer):
            row = compare_selection(replace(same(reference), kept_indices=kept), reference, FLOAT16)
            assert any("top-8" in failure for failure in row.failures)

    def test_a_dropped_text_token_fails(self, rng):
        reference = reference_trace(rng)
        row = compare_selection(replace(same(reference), kept_indices=reference.kept_indices[1:]), reference, FLOAT16)
        assert "text" in row.failures[0]

    def test_a_permuted_kept_set_fails(self, rng):
        reference = reference_trace(rng)
        permuted = rng.permutation(reference.kept_indices)
        assert compare_selection(replace(same(reference), kept_indices=permuted), reference, FLOAT16).failures

    def test_each_image_of_a_quota_keeps_its_own_count(self, rng):
        groups = np.repeat([0, 1], 10)
        reference = reference_trace(rng, groups)
        assert compare_selection(same(reference), reference, FLOAT32).failures == ()
        ranked = [np.flatnonzero(groups == g)[np.argsort(-reference.scores[groups == g])] for g in (0, 1)]
        lost, won = VISUAL[ranked[0][3]], VISUAL[ranked[1][4]]
        kept = np.sort(np.append(np.setdiff1d(reference.kept_indices, [lost]), won))
        loose = replace(FLOAT32, score_error=2.0)
        row = compare_selection(replace(same(reference), kept_indices=kept), reference, loose)
        assert row.failures == ("kept 3 of a top-4", "kept 5 of a top-4")

    def test_wrong_scores_fail_even_where_the_same_tokens_are_kept(self, rng):
        reference = reference_trace(rng)
        row = compare_selection(replace(same(reference), scores=reference.scores * 1.1), reference, FLOAT16)
        assert row.rank_correlation == 1.0 and "score error" in row.failures[0]

    def test_a_shift_of_all_scores_changes_no_choice_and_is_left_to_the_stage_row(self, rng):
        reference = reference_trace(rng)
        shifted = reference.scores + np.float32(0.5)
        assert compare_selection(replace(same(reference), scores=shifted), reference, FLOAT32).failures == ()
        assert compare_stage("scores", shifted[None], reference.scores[None], FLOAT32.scores).failures

    def test_scores_that_are_all_alike_may_differ_by_rounding(self, rng):
        reference = replace(reference_trace(rng), scores=np.full(20, 0.25, dtype=np.float32))
        rounded = reference.scores * (1 + rng.uniform(-1e-7, 1e-7, 20).astype(np.float32))
        trace = replace(same(reference), scores=rounded, kept_indices=swap(reference_trace(rng), 0, 0))
        assert compare_selection(trace, reference, FLOAT32).failures == ()

    def test_nothing_dropped_has_no_margin(self, rng):
        reference = replace(reference_trace(rng), kept_visual=np.arange(20), kept_indices=np.arange(28))
        row = compare_selection(same(reference), reference, FLOAT32)
        assert row.margin is None and row.failures == ()

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_score_that_is_not_finite_fails(self, rng, value):
        reference = reference_trace(rng)
        scores = reference.scores.copy()
        scores[4] = value
        assert compare_selection(replace(same(reference), scores=scores), reference, FLOAT16).failures


class TestTokens:
    def test_equal_logits_pass(self, rng):
        reference = reference_trace(rng)
        row = compare_tokens(reference.tokens, same(reference), reference, FLOAT32)
        assert row.failures == () and row.tokens_equal and row.argmax_agreement == 1.0 and row.kl == pytest.approx(0)

    def test_another_distribution_fails(self, rng):
        reference = reference_trace(rng)
        sharper = replace(same(reference), logits=reference.logits * 1.5)
        row = compare_tokens(reference.tokens, sharper, reference, FLOAT16)
        assert row.tokens_equal and "KL" in row.failures[0]

    def test_a_shift_of_all_logits_is_no_other_distribution(self, rng):
        reference = reference_trace(rng)
        shifted = replace(same(reference), logits=reference.logits + 3)
        assert compare_tokens(reference.tokens, shifted, reference, FLOAT32).kl == pytest.approx(0, abs=1e-6)

    def test_another_token_passes_only_at_a_near_tie(self, rng):
        reference = reference_trace(rng)
        best, second = np.argsort(-reference.logits[2])[:2]
        tokens = list(reference.tokens)
        tokens[2] = int(second)
        row = compare_tokens(tokens, same(reference), reference, FLOAT32)
        assert (row.tokens_equal, row.first_difference) == (False, 2) and "chosen otherwise" in row.failures[0]

        logits = reference.logits.copy()
        logits[2, second] = logits[2, best] - 1e-5
        near = replace(reference, logits=logits)
        row = compare_tokens(tokens, same(near), near, FLOAT32)
        assert not row.tokens_equal and row.failures == ()

    def test_fewer_steps_fail(self, rng):
        reference = reference_trace(rng)
        short = replace(same(reference), logits=reference.logits[:-1])
        assert compare_tokens(reference.tokens, short, reference, FLOAT32).failures
        assert compare_tokens(reference.tokens[:-1], same(reference), reference, FLOAT32).failures

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_logits_that_are_not_finite_fail(self, rng, value):
        reference = reference_trace(rng)
        logits = reference.logits.copy()
        logits[1, 1] = value
        assert compare_tokens(reference.tokens, replace(same(reference), logits=logits), reference, FLOAT16).failures


def test_rank_correlation_takes_the_mean_rank_of_equal_values():
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0, 40.0])
    assert rank_correlation(a, b) == pytest.approx(0.9486833)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(np.ones(3), np.ones(3)) == 1.0
    assert rank_correlation(np.ones(3), np.arange(3.0)) == 0.0


def report_of(reference, trace):
    stages = (
        compare_stage("vision", trace.visual_embeds, reference.visual_embeds, FLOAT32.vision),
        compare_stage("decoder", trace.logits, reference.logits, FLOAT32.decoder),
    )
    case = CaseReport(
        "photo.png",
        0.2,
        stages,
        compare_selection(trace, reference, FLOAT32),
        compare_tokens(reference.tokens, trace, reference, FLOAT32),
    )
    return ParityReport(
        "b", "c", "onnxruntime on cpu", "float32", "float32", FLOAT32, (case,), case.failures, not case.failures
    )


def test_the_table_names_what_is_out_of_tolerance(rng):
    reference = reference_trace(rng)
    trace = replace(same(reference), visual_embeds=reference.visual_embeds * 2)
    text = io.StringIO()
    Console(file=text, width=160).print(*told(report_of(reference, trace)), sep="\n", soft_wrap=True)
    assert "OUT OF TOLERANCE photo.png, keep ratio 0.2: vision: norm ratio" in text.getvalue()
    assert "in tolerance: 0 of 1 cases" in text.getvalue()


def test_the_json_is_valid_even_with_nan_in_it(rng, capsys):
    reference = reference_trace(rng)
    trace = replace(same(reference), visual_embeds=reference.visual_embeds * np.nan)
    print_json(report_of(reference, trace))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["passed"] is False
    assert report["cases"][0]["stages"][0]["cosine"] is None
    assert report["cases"][0]["stages"][1]["failures"] == []
