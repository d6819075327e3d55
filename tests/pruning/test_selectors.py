"""Selectors: each against its own definition in plain loops, and all of them through one bundle."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.hawk import head_scores, normalize
from hawk_trt.pruning.selectors import SELECTORS, best, best_varied, cdpruner, count_of_mass, dart, divprune
from hawk_trt.request import SCORED
from hawk_trt.request import SELECTORS as NAMES
from hawk_trt.runtime.reference import tensor_prompts
from hawk_trt.runtime.trace import traced


def test_the_names_that_a_config_takes_are_those_that_there_are():
    assert set(SELECTORS) == set(NAMES)
    assert set(SCORED) <= set(NAMES)


HOST = sorted(set(SELECTORS) - set(SCORED))
SAMPLE = next(generate(3, 1))


def embeds(seed, n=12, hidden=6, text=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, hidden), np.float32), rng.standard_normal((text, hidden), np.float32)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def divprune_by_loops(v, k):
    n = range(len(v))
    kept = [max(n, key=lambda i: min(1 - cosine(v[i], v[j]) for j in n if j != i))]
    while len(kept) < k:
        kept.append(max(set(n) - set(kept), key=lambda i: min(1 - cosine(v[i], v[j]) for j in kept)))
    return sorted(kept)


def cdpruner_by_determinants(v, text, k):
    near = np.array([np.mean([cosine(row, word) for word in text]) for row in v])
    relevance = (near - near.min()) / (near.max() - near.min())
    likeness = np.array([[cosine(a, b) for b in v] for a in v])
    kernel = relevance[:, None] * likeness * relevance
    kept = []
    while len(kept) < k:
        left = [i for i in range(len(v)) if i not in kept]
        kept.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])])))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(15))
def test_divprune_takes_the_farthest_token_each_time(seed):
    v, _ = embeds(seed, n=10 + seed)
    for k in (1, 2, 5, 9):
        chosen = divprune(v, k)
        assert chosen.dtype == np.int64
        assert chosen.tolist() == divprune_by_loops(v, k)


def test_divprune_keeps_tokens_at_least_half_as_far_apart_as_the_best_set():
    # The greedy choice in the order of 1 - cos is that in the order of the chord, which is a metric.
    for seed in range(5):
        v, _ = embeds(seed, n=9)
        unit = v / np.linalg.norm(v, axis=1, keepdims=True)
        chord = np.linalg.norm(unit[:, None] - unit, axis=-1)

        def spread(kept, chord=chord):
            return min(chord[a, b] for a, b in combinations(kept, 2))

        assert spread(divprune(v, 4)) >= max(map(spread, combinations(range(9), 4))) / 2


@pytest.mark.parametrize("seed", range(15))
def test_cdpruner_takes_the_largest_determinant_each_time(seed):
    v, text = embeds(seed, n=10 + seed, hidden=16)
    for k in (1, 2, 5, 8):
        chosen = cdpruner(v, text, k)
        assert chosen.dtype == np.int64
        assert chosen.tolist() == cdpruner_by_determinants(v, text, k)


def test_equal_tokens_are_kept_once_before_any_comes_twice():
    v = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]]
    assert divprune(v, 3).tolist() == [0, 2, 4]
    assert divprune(v, 4).tolist() == [0, 1, 2, 4]
    assert cdpruner(v, np.ones((1, 3), np.float32), 3).tolist() == [0, 2, 4]
    for k in range(1, 9):
        same = np.ones((8, 4), np.float32)
        assert divprune(same, k).tolist() == cdpruner(same, same[:1], k).tolist() == list(range(k))


def test_cdpruner_fills_up_with_the_most_relevant_tokens_once_the_kept_ones_span_all():
    rng = np.random.default_rng(0)
    v = rng.standard_normal((20, 2)).astype(np.float32) @ rng.standard_normal((2, 8)).astype(np.float32)
    text = rng.standard_normal((1, 8)).astype(np.float32)
    two = cdpruner(v, text, 2)
    seven = cdpruner(v, text, 7)
    relevant = np.argsort([-cosine(row, text[0]) for row in v])
    expected = [*two, *[i for i in relevant if i not in two][:5]]
    assert seven.tolist() == sorted(expected)


def test_text_changes_what_cdpruner_keeps_and_none_leaves_it_to_diversity():
    v, text = embeds(1, n=30, hidden=32)
    assert cdpruner(v, text, 8).tolist() != cdpruner(v, -text, 8).tolist()
    none = cdpruner(v, text[:0], 8)
    assert none.tolist() != cdpruner(v, text, 8).tolist()
    likeness = np.array([[cosine(a, b) for b in v] for a in v])
    assert np.linalg.det(likeness[np.ix_(none, none)]) >= np.linalg.det(likeness[:8, :8])


def test_a_token_of_zeros_does_no_harm():
    v, text = embeds(2)
    v[3] = 0.0
    for chosen in (divprune(v, 5), cdpruner(v, text, 5), dart(v, text, 5)):
        assert len(set(chosen.tolist())) == 5


def test_dart_keeps_its_pivots_and_what_is_least_like_any():
    v, text = embeds(4, n=30, text=9)
    chosen = dart(v, text, 10).tolist()
    pivots = np.argsort(-np.abs(v).sum(1))[:4]
    words = np.argsort(-np.abs(text).sum(1))[:4]
    likest = {
        i: max([cosine(v[i], v[p]) for p in pivots] + [cosine(v[i], text[w]) for w in words])
        for i in range(30)
        if i not in pivots
    }
    assert chosen == sorted([*pivots, *sorted(likest, key=likest.__getitem__)[:6]])
    assert dart(v, text, 2).tolist() == sorted(pivots[:2])
    assert len(dart(v, text[:0], 10)) == 10


def test_all_tokens_are_kept_where_k_is_their_number():
    v, text = embeds(5)
    assert all(chosen.tolist() == list(range(12)) for chosen in (divprune(v, 12), cdpruner(v, text, 12)))


def test_without_diversity_the_best_are_kept_and_with_it_a_near_tie_that_is_new():
    scores = np.array([9, 8, 7, 6.9, 1, 0], np.float32)
    v = np.eye(6, dtype=np.float32)
    v[2] = v[0]  # the third best looks like the best
    assert best(scores, 3).tolist() == best_varied(scores, v, 3, 0.0).tolist() == [0, 1, 2]
    assert best_varied(scores, v, 3, 0.34).tolist() == [0, 1, 3]
    assert best_varied(scores, v, 5, 1.0).tolist() == [0, 1, 3, 4, 5]


def test_the_lower_index_wins_a_tie():
    assert best(np.array([1, 2, 2, 2], np.float32), 2).tolist() == [1, 2]


def test_score_mass_counts_what_lies_above_the_mean():
    scores = np.array([-1, -1, -1, -1, 1, 3], np.float32)  # the mean is 0: 3 and 1 are the mass
    assert [count_of_mass(scores, mass) for mass in (0.1, 0.75, 0.76, 1.0)] == [1, 1, 2, 2]
    assert count_of_mass(np.ones(5, np.float32), 0.1) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selector": "best"}, "selector: got 'best', expected one of hawk, uniform"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True"),
        ({"keep_mass": 0.0}, "keep_mass: got 0.0"),
        ({"keep_mass": 1.1}, "keep_mass: got 1.1"),
        ({"diversity": -0.1}, "diversity: got -0.1"),
        ({"diversity": float("nan")}, "diversity: got nan"),
        ({"keep_mass": 0.5, "selector": "divprune"}, "keep_mass: it needs a selector that ranks by scores"),
        ({"diversity": 0.5, "selector": "random"}, "diversity: it needs a selector that ranks by scores"),
        ({"head_weights": (1.0,), "selector": "uniform"}, "head_weights: selector 'uniform' weighs all heads alike"),
    ],
)
def test_prunings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InvalidInput, match=message):
        PruningConfig(**fields)


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def inputs(pipe):
    return pipe.prepare(SAMPLE.question, images=[SAMPLE.image])


def kept_visual(pipe, inputs, result):
    """Kept tokens, counted among the visual ones."""
    visual = np.flatnonzero(np.ravel(inputs.input_ids) == pipe.bundle.manifest.special_tokens.image)
    return np.flatnonzero(np.isin(visual, result.kept_indices))


@pytest.mark.parametrize("selector", HOST)
def test_a_selector_on_the_host_drives_the_graphs(pipe, inputs, selector):
    plain = pipe.generate(inputs, pruning=PruningConfig(), max_new_tokens=1)
    result = pipe.generate(inputs, pruning=PruningConfig(selector=selector, seed=4), max_new_tokens=1)
    assert result.num_kept == plain.num_kept == 13
    np.testing.assert_allclose(result.scores, plain.scores, atol=1e-6)  # HAWK's, whoever chooses
    trace = traced(pipe, inputs, PruningConfig(keep_ratio=1.0), ())
    layout = pipe.processor.layout(inputs)
    text = pipe.bundle.embedding_table()[layout.input_ids[layout.query_weights > 0]]
    expected = {
        "divprune": lambda v: divprune(v, 13),
        "cdpruner": lambda v: cdpruner(v, text, 13),
        "dart": lambda v: dart(v, text, 13),
        "norm": lambda v: best(np.linalg.norm(v, axis=1), 13),
        "random": lambda v: np.sort(np.random.default_rng(4).permutation(len(v))[:13]),
    }[selector](trace.visual_embeds)
    np.testing.assert_array_equal(kept_visual(pipe, inputs, result), expected)
    assert 0 < result.timings.select < result.timings.total
    assert plain.timings.select == 0


def test_uniform_is_hawk_with_equal_weights(pipe, inputs):
    heads = pipe.bundle.manifest.language.num_attention_heads
    one, equal = (1.0, *[0.0] * (heads - 1)), (1.0 / heads,) * heads
    uniform = pipe.generate(inputs, pruning=PruningConfig(selector="uniform"), max_new_tokens=1)
    for weights, same in ((equal, True), (one, False)):
        hawk = pipe.generate(inputs, pruning=PruningConfig(head_weights=weights), max_new_tokens=1)
        assert np.array_equal(hawk.scores, uniform.scores) == same


@pytest.mark.parametrize(
    "pruning",
    [PruningConfig(selector="fastv-input"), PruningConfig(query="last", head_weights=(0.0, 2.0, 1.0, *[0.5] * 5))],
)
def test_the_last_token_of_the_prompt_asks(pipe, inputs, tiny_checkpoint, pruning):
    """For fastv-input with equal head weights, for hawk with its own."""
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=1)
    assert result.query == "last"
    language = pipe.bundle.manifest.language
    stored = load_file(tiny_checkpoint / "model.safetensors")
    tensors = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    layer = "model.layers.0."
    layout = pipe.processor.layout(inputs)
    visual = layout.visual_rows >= 0
    merged = pipe.bundle.embedding_table()[layout.input_ids].astype(np.float32)
    merged[visual] = traced(pipe, inputs, PruningConfig(keep_ratio=1.0), ()).visual_embeds
    last = np.zeros(len(merged), np.float32)
    last[-1] = 1.0
    raw = head_scores(
        merged,
        last,
        tensors[f"{layer}input_layernorm.weight"],
        language.rms_norm_eps,
        *((tensors[f"{layer}self_attn.{n}_proj.weight"], tensors[f"{layer}self_attn.{n}_proj.bias"]) for n in "qk"),
        language.num_attention_heads,
        language.num_key_value_heads,
    )
    normal = normalize(raw, visual, "l2")[:, visual]
    scores = np.array(pruning.head_weights or [1 / len(normal)] * len(normal), np.float32) @ normal
    np.testing.assert_allclose(result.scores, scores, atol=1e-5)
    np.testing.assert_array_equal(kept_visual(pipe, inputs, result), best(result.scores, 13))
    asked = pipe.generate(inputs, pruning=replace(pruning, selector="hawk", query=None), max_new_tokens=1)
    assert asked.query == "paper" and not np.allclose(asked.scores, result.scores, atol=1e-3)


def test_hawk_that_the_last_token_asks_is_fastv_input_where_heads_weigh_alike(pipe, inputs):
    one, other = (
        pipe.generate(inputs, pruning=pruning, max_new_tokens=1)
        for pruning in (PruningConfig(query="last"), PruningConfig(selector="fastv-input"))
    )
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.kept_indices, other.kept_indices)


@pytest.mark.parametrize("selector", ["cdpruner", "dart"])
def test_selectors_that_read_the_question_read_it_whatever_scores(pipe, inputs, selector):
    plain, last = (
        pipe.generate(inputs, pruning=PruningConfig(selector=selector, query=query), max_new_tokens=1)
        for query in (None, "last")
    )
    assert last.query == plain.query == "paper"
    np.testing.assert_array_equal(last.kept_indices, plain.kept_indices)


def test_a_seed_gives_the_same_random_choice_and_a_larger_one_holds_the_smaller(pipe, inputs):
    def kept(seed, keep_ratio=0.2):
        pruning = PruningConfig(keep_ratio=keep_ratio, selector="random", seed=seed)
        return set(pipe.generate(inputs, pruning=pruning, max_new_tokens=1).kept_indices.tolist())

    assert kept(1) == kept(1) != kept(2)
    assert kept(1) < kept(1, 0.4)


@pytest.mark.parametrize(
    "pruning",
    [
        *(PruningConfig(keep_ratio=0.3, selector=name, seed=7) for name in SELECTORS),
        PruningConfig(keep_ratio=0.5, keep_mass=0.4),
        PruningConfig(keep_ratio=0.3, diversity=0.5),
        PruningConfig(keep_ratio=0.3, selector="cdpruner", quota="per-image"),
    ],
    ids=lambda pruning: f"{pruning.selector} {pruning.quota} {pruning.keep_mass} {pruning.diversity}",
)
def test_a_batch_chooses_as_each_prompt_alone(pipe, pruning):
    samples = list(generate(5, 2))
    rows = [pipe.prepare(s.question, images=[s.image]) for s in samples]
    rows.append(pipe.prepare(samples[0].question, images=[s.image for s in samples]))
    rows.append(pipe.prepare("Hello"))
    together = pipe.generate_batch(rows, pruning=pruning, max_new_tokens=2)
    for row, result in zip(rows, together, strict=True):
        alone = pipe.generate(row, pruning=pruning, max_new_tokens=2)
        assert (result.token_ids, result.num_kept) == (alone.token_ids, alone.num_kept)
        np.testing.assert_array_equal(result.kept_indices, alone.kept_indices)


def test_keep_mass_keeps_as_few_as_carry_it_and_no_more_than_the_ratio_allows(pipe, inputs):
    scores = pipe.generate(inputs, pruning=PruningConfig(keep_ratio=1.0), max_new_tokens=1).scores
    enough = count_of_mass(scores, 0.5)
    assert 1 < enough < 32

    def result(**fields):
        return pipe.generate(inputs, pruning=PruningConfig(keep_mass=0.5, **fields), max_new_tokens=1)

    np.testing.assert_array_equal(kept_visual(pipe, inputs, result(keep_ratio=1.0)), best(scores, enough))
    assert result(keep_ratio=1 / 64).num_kept == 1
    assert result(keep_ratio=1.0, min_visual_tokens=40).num_kept == 40


def test_diversity_swaps_the_last_places_only(pipe, inputs):
    plain, varied = (
        set(pipe.generate(inputs, pruning=PruningConfig(diversity=share), max_new_tokens=1).kept_indices.tolist())
        for share in (0.0, 0.5)
    )
    assert len(plain) == len(varied)
    assert 0 < len(plain - varied) <= 6


@pytest.mark.parametrize("selector", ["hawk", "divprune"])
def test_each_frame_of_a_video_keeps_its_share(pipe, selector):
    inputs = tensor_prompts(pipe.bundle.manifest, 2)["video of 6 frames"]
    video = np.flatnonzero(np.ravel(inputs.input_ids) == pipe.bundle.manifest.special_tokens.video)
    frames = np.split(video, int(np.asarray(inputs.video_grid_thw)[0, 0]))
    assert len(frames) > 1
    pruning = PruningConfig(keep_ratio=0.25, selector=selector, quota="per-frame")
    kept = pipe.generate(inputs, pruning=pruning, max_new_tokens=1).kept_indices
    shares = [int(np.isin(frame, kept).sum()) for frame in frames]
    assert shares == [-(-len(frame) // 4) for frame in frames]
    whole = pipe.generate(inputs, pruning=replace(pruning, quota="per-image"), max_new_tokens=1).kept_indices
    assert [int(np.isin(frame, whole).sum()) for frame in frames] != shares


def test_a_function_of_ones_own_is_a_selector(pipe, inputs):
    seen = {}

    def lowest(candidates, k):
        seen["shapes"] = (candidates.scores.shape, candidates.visual_embeds.shape, candidates.text_embeds.shape[1])
        return np.argsort(candidates.scores)[:k]

    result = pipe.generate(inputs, pruning=PruningConfig(selector=lowest), max_new_tokens=1)
    np.testing.assert_array_equal(kept_visual(pipe, inputs, result), np.sort(np.argsort(result.scores)[:13]))
    hidden = pipe.bundle.manifest.language.hidden_size
    assert seen["shapes"] == ((64,), (64, hidden), hidden)


@pytest.mark.parametrize("wrong", [[0] * 13, list(range(12)), list(range(52, 65)), [0.5] * 13])
def test_a_function_that_does_not_choose_k_of_the_candidates_is_refused(pipe, inputs, wrong):
    with pytest.raises(InvalidInput, match=r"selector: got .*, expected 13 different integers from 0 to 63"):
        pipe.generate(inputs, pruning=PruningConfig(selector=lambda _candidates, _k: np.array(wrong)))
