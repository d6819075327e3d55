"""The numpy oracle, and hawk::WeightedTopK's function body against it."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.graph import GraphBuilder
from export.weighted_topk import weighted_topk
from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.pruning import hawk
from hawk_trt.stages import BIAS_DROP, BIAS_KEEP, NORMALIZATIONS
from targets import ON_CPU

TENSORS = (
    (
        TensorEntry("head_scores", "float32", ("batch", "heads", "seq_len")),
        TensorEntry("head_weights", "float32", ("heads",)),
        TensorEntry("visual_rows", "int64", ("batch", "seq_len")),
        TensorEntry("select_bias", "float32", ("batch", "seq_len")),
        TensorEntry("slots", "int64", ("num_kept_total",)),
    ),
    (
        TensorEntry("kept_indices", "int32", ("batch", "num_kept_total")),
        TensorEntry("scores", "float32", ("batch", "seq_len")),
    ),
)


def session(target, normalization):
    entry = GraphEntry("weighted_topk", target, "weighted_topk.onnx", *TENSORS)
    builder = GraphBuilder(entry, "float32", weights=None)
    kept, scores = weighted_topk(builder, normalization, *builder.inputs.values())
    builder.outputs({"kept_indices": kept, "scores": scores})
    return ort.InferenceSession(builder.model().SerializeToString())


SESSIONS = {}


def run_graph(target, normalization, arrays):
    key = (target, normalization)
    if key not in SESSIONS:
        SESSIONS[key] = session(*key)
    return SESSIONS[key].run(["kept_indices", "scores"], arrays)


def random_case(seed, batch, heads, seq_len, *, ties=False, broken=False):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 3, (batch, heads, seq_len)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    rows = np.where(rng.random((batch, seq_len)) < 0.6, np.arange(seq_len), -1).astype(np.int64)
    if broken:
        bad = rng.random(scores.shape) < 0.1
        scores[bad] = rng.choice([np.nan, np.inf, -np.inf], int(bad.sum()))
    bias = np.where(rows >= 0, 0.0, BIAS_KEEP).astype(np.float32)
    pads = rng.integers(0, seq_len // 4 + 1)
    bias[:, :pads], rows[:, :pads] = BIAS_DROP, -1
    weights = rng.random(heads).astype(np.float32)
    text = int((bias == BIAS_KEEP).sum(axis=1).max())
    total = int(rng.integers(max(text, 1), seq_len - pads + 1)) if seq_len - pads >= max(text, 1) else seq_len
    return {
        "head_scores": scores,
        "head_weights": weights,
        "visual_rows": rows,
        "select_bias": bias,
        "slots": np.zeros(total, np.int64),
    }


@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    heads=st.integers(1, 8),
    seq_len=st.integers(1, 60),
    ties=st.booleans(),
    broken=st.booleans(),
)
def test_the_function_body_follows_the_oracle(target, normalization, seed, batch, heads, seq_len, ties, broken):
    arrays = random_case(seed, batch, heads, seq_len, ties=ties, broken=broken)
    kept, scores = run_graph(target, normalization, arrays)
    assert np.isfinite(scores).all()
    expected_kept, expected_scores = hawk.weighted_topk(
        arrays["head_scores"],
        arrays["head_weights"],
        arrays["visual_rows"],
        arrays["select_bias"],
        len(arrays["slots"]),
        normalization,
    )
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)
    # sums in another order differ in their last bits: the kept sets must be equal where no score is that near the cut
    same_keys = hawk.weighted_topk_keys(scores, arrays["select_bias"])
    own = np.sort(np.argsort(-same_keys, axis=-1, kind="stable")[:, : len(arrays["slots"])], axis=-1)
    np.testing.assert_array_equal(kept, own)
    keys = hawk.weighted_topk_keys(expected_scores, arrays["select_bias"]).astype(np.float64)
    margins = np.sort(-keys, axis=-1)
    cut = len(arrays["slots"])
    for row in range(batch):
        if cut == seq_len or margins[row, cut] - margins[row, cut - 1] > 1e-5:
            np.testing.assert_array_equal(kept[row], expected_kept[row])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_one_token_that_is_not_finite_neither_spreads_nor_drops_text(normalization):
    arrays = random_case(1, 1, 4, 40)
    clean = run_graph("portable", normalization, arrays)[1]
    token = int(np.flatnonzero(arrays["visual_rows"][0] >= 0)[0])
    arrays["head_scores"][0, :, token] = np.nan
    kept, scores = run_graph("portable", normalization, arrays)
    text = np.flatnonzero(arrays["select_bias"][0] == np.float32(BIAS_KEEP))
    assert np.isin(text, kept[0]).all()
    assert np.isfinite(scores).all()
    assert np.count_nonzero(scores) >= np.count_nonzero(clean) - 1


def test_the_lower_index_wins_a_tie():
    scores = np.zeros((1, 2, 9), np.float32)
    scores[0, :, [2, 5, 7]] = 1.0
    rows = np.arange(9)[None]
    kept, _ = hawk.weighted_topk(scores, np.ones(2, np.float32), rows, np.zeros((1, 9), np.float32), 5, "l2")
    assert kept[0].tolist() == [0, 1, 2, 5, 7]


def test_a_bias_decides_alone_and_scores_are_reported_before_it():
    arrays = random_case(3, 1, 4, 20)
    arrays["visual_rows"][:] = np.arange(20)
    arrays["select_bias"][:] = BIAS_DROP
    chosen = [1, 4, 19]
    arrays["select_bias"][0, chosen] = BIAS_KEEP
    arrays["slots"] = np.zeros(3, np.int64)
    kept, scores = run_graph("cpu", "l2", arrays)
    assert kept[0].tolist() == chosen
    arrays["select_bias"][:] = 0
    np.testing.assert_array_equal(scores, run_graph("cpu", "l2", arrays)[1])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_without_visual_tokens_every_score_is_zero(normalization):
    arrays = random_case(5, 2, 4, 12)
    arrays["visual_rows"][:] = -1
    arrays["select_bias"][:] = BIAS_KEEP
    arrays["slots"] = np.zeros(12, np.int64)
    kept, scores = run_graph("portable", normalization, arrays)
    assert not scores.any()
    assert (kept == np.arange(12)).all()


def test_weights_are_used_as_given():
    scores = np.random.default_rng(0).normal(size=(1, 3, 10)).astype(np.float32)
    rows, bias = np.arange(10)[None], np.zeros((1, 10), np.float32)
    weights = np.array([0.2, 0.5, 0.1], np.float32)
    once = hawk.weighted_topk(scores, weights, rows, bias, 4, "l2")
    thrice = hawk.weighted_topk(scores, 3 * weights, rows, bias, 4, "l2")
    np.testing.assert_array_equal(once[0], thrice[0])
    np.testing.assert_allclose(3 * once[1], thrice[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "ratio", "minimum", "kept"),
    [(50, 0.3, 1, 15), (1296, 0.198, 1, 257), (3, 0.1, 2, 2), (3, 0.1, 9, 3), (0, 0.2, 1, 0)],
)
def test_the_kept_count_is_rounded_up_in_float64(count, ratio, minimum, kept):
    assert hawk.num_kept(count, ratio, minimum) == kept


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="expected one of l2, softmax, minmax"):
        hawk.normalize(np.zeros((1, 1, 2), np.float32), np.ones((1, 2), bool), "l1")
