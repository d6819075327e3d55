"""The PyTorch reference against what the authors' own code gave, and against its own rules."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import golden
from hawk_trt.apps.parity.prompt_rules import (
    PromptTokens,
    VisualItem,
    frame_numbers,
    keep_best,
    mrope_positions,
    num_kept,
    query_range,
)
from hawk_trt.errors import CheckpointError, ParityError
from hawk_trt.request import ModelInputs, PruningConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")
from hawk_trt.apps.parity.reference import Reference

TOKENS = PromptTokens(
    image=golden.IMAGE,
    video=golden.VIDEO,
    vision_end=golden.VISION_END,
    im_start=500,
    im_end=golden.IM_END,
    user=(401, 10),
)


@pytest.fixture(scope="module")
def l2_reference():
    return _load("l2")


@cache
def _load(normalization):
    return Reference.load(golden.MODEL, head_weights=(0.25,) * 4, normalization=normalization)


def _case(name):
    case = golden.load_case(name)
    pruning = PruningConfig(
        keep_ratio=case.keep_ratio, head_weights=case.head_weights, min_visual_tokens=case.min_visual_tokens
    )
    return case, ModelInputs(**case.inputs), pruning


@pytest.mark.parametrize("name", golden.CASES)
def test_reference_reproduces_the_authors_case(name):
    case, inputs, pruning = _case(name)
    reference = _load(case.normalization)
    trace = reference.run(reference.embed(inputs, TOKENS), pruning, steps=len(case.expected["new_tokens"]))

    expected, kept = case.expected, case.kept_indices
    shown = np.flatnonzero(inputs.attention_mask[0])
    np.testing.assert_array_equal(trace.kept_indices, kept)
    np.testing.assert_array_equal(trace.tokens, expected["new_tokens"])
    np.testing.assert_array_equal(trace.position_ids, expected["position_ids"][:, 0, shown])
    np.testing.assert_array_equal(trace.kept_position_ids, expected["position_ids"][:, 0, kept])
    np.testing.assert_allclose(trace.inputs_embeds, expected["inputs_embeds"][0, shown], atol=1e-5)
    np.testing.assert_allclose(trace.logits, expected["step_logits"], atol=golden.LOGIT_TOLERANCE)
    if "visual_scores" in expected:
        np.testing.assert_array_equal(trace.query_indices, expected["query_indices"])
        np.testing.assert_array_equal(trace.visual_indices, expected["visual_indices"])
        np.testing.assert_allclose(trace.head_scores, expected["raw_head_scores"], atol=1e-5)
        np.testing.assert_allclose(trace.scores, expected["visual_scores"], atol=golden.SCORE_TOLERANCE)


def test_forcing_its_own_tokens_changes_no_logits(l2_reference):
    _, inputs, pruning = _case("08_two_img_adjacent_k040")
    prompt = l2_reference.embed(inputs, TOKENS)
    free = l2_reference.run(prompt, pruning, steps=6)
    forced = l2_reference.run(prompt, pruning, forced_tokens=free.tokens)
    np.testing.assert_array_equal(free.logits, forced.logits)
    other = l2_reference.run(prompt, pruning, forced_tokens=[7, *free.tokens[1:]])
    np.testing.assert_array_equal(free.logits[0], other.logits[0])
    assert np.abs(free.logits[1:] - other.logits[1:]).max() > 0.1


def test_a_given_kept_set_is_kept_whatever_the_scores_say(l2_reference):
    _, inputs, pruning = _case("23_img_left_padded_k050")
    prompt = l2_reference.embed(inputs, TOKENS)
    chosen = l2_reference.run(prompt, pruning)
    again = l2_reference.run(prompt, PruningConfig(keep_ratio=0.1), kept_indices=chosen.kept_indices)
    np.testing.assert_array_equal(again.kept_indices, chosen.kept_indices)
    np.testing.assert_array_equal(again.logits, chosen.logits)


def test_dropped_tokens_have_no_influence_on_what_is_kept(l2_reference):
    _, inputs, pruning = _case("00_img_8x8_k050_uniform")
    prompt = l2_reference.embed(inputs, TOKENS)
    before = l2_reference.run(prompt, pruning, steps=3)
    dropped = np.setdiff1d(before.visual_indices, before.kept_indices)
    embeds = prompt.embeds.clone()
    embeds[dropped.tolist()] = 1e6
    after = l2_reference.run(replace(prompt, embeds=embeds), pruning, steps=3, kept_indices=before.kept_indices)
    np.testing.assert_array_equal(before.logits, after.logits)


def test_keep_ratio_one_equals_the_plain_model(l2_reference):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, inputs, _ = _case("17_img_8x8_k100_notapplied")
    trace = l2_reference.run(l2_reference.embed(inputs, TOKENS), PruningConfig(keep_ratio=1.0))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden.MODEL, dtype=torch.float32)
    ids = torch.from_numpy(inputs.input_ids)
    with torch.inference_mode():
        plain = model(
            input_ids=ids,
            pixel_values=torch.from_numpy(inputs.pixel_values.astype(np.float32)),
            image_grid_thw=torch.from_numpy(inputs.image_grid_thw),
            mm_token_type_ids=(ids == TOKENS.image).int(),
        ).logits[0, -1]
    np.testing.assert_allclose(trace.logits[0], plain.numpy(), atol=1e-5)
    assert trace.scores.shape == (16,)


def test_a_softmaxed_score_sums_to_the_head_weights():
    reference = _load("softmax")
    _, inputs, _ = _case("00_img_8x8_k050_uniform")
    trace = reference.run(reference.embed(inputs, TOKENS), PruningConfig(head_weights=(1.0, 2.0, 0.0, 0.5)))
    assert trace.scores.sum() == pytest.approx(3.5, abs=1e-5)


def test_placeholders_that_do_not_fit_their_grid_are_refused(l2_reference):
    _, inputs, _ = _case("00_img_8x8_k050_uniform")
    for wrong in (inputs.input_ids[:, :-20], np.insert(inputs.input_ids, 20, 505, axis=1)):
        with pytest.raises(ParityError, match="placeholders"):
            l2_reference.embed(
                ModelInputs(wrong, pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw), TOKENS
            )


def test_a_masked_image_is_not_seen(l2_reference):
    _, inputs, pruning = _case("08_two_img_adjacent_k040")
    mask = np.ones_like(inputs.input_ids)
    mask[:, 14:32] = 0  # the first image with its vision_start and vision_end
    both = ModelInputs(inputs.input_ids, mask, inputs.pixel_values, inputs.image_grid_thw)
    second = ModelInputs(
        np.delete(inputs.input_ids, np.s_[14:32], axis=1), None, inputs.pixel_values[64:], inputs.image_grid_thw[1:]
    )
    masked = l2_reference.run(l2_reference.embed(both, TOKENS), pruning)
    alone = l2_reference.run(l2_reference.embed(second, TOKENS), pruning)
    np.testing.assert_allclose(masked.logits, alone.logits, atol=1e-4)
    np.testing.assert_array_equal(masked.kept_visual, alone.kept_visual)


@pytest.mark.parametrize("broken", ["missing", "truncated", "other", "renamed"])
def test_a_checkpoint_that_cannot_be_used_is_an_error_not_random_weights(broken, tmp_path):
    source = golden.MODEL
    config = json.loads((source / "config.json").read_text())
    weights = (source / "model.safetensors").read_bytes()
    if broken == "truncated":
        weights = weights[: len(weights) // 2]
    if broken == "other":
        config["model_type"] = "llama"
    if broken == "renamed":
        weights = weights.replace(b"layers.0.self_attn.q_proj.bias", b"layers.0.self_attn.x_proj.bias")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if broken != "missing":
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError):
        Reference.load(tmp_path, head_weights=(1.0,) * 4, normalization="l2")


def test_importing_parity_imports_no_torch():
    code = "import sys, hawk_trt.apps.parity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestQueryRange:
    """Letters stand for text, I for the image placeholder, | for vision_end, S and E for im_start and im_end."""

    @pytest.mark.parametrize(
        ("prompt", "query"),
        [
            ("SuII|abcESy", "abc"),
            ("SuabcII|ESy", "ESy"),  # an im_end right behind the image does not end the range
            ("SuII|aII|bcESy", "bc"),
            ("SuII|aESybESucESy", "aESybESuc"),  # later turns are part of it
            ("SuII|abc", "abc"),
            ("SuII|", "|"),
            ("SuIIabE", "ab"),  # no vision_end: from the last visual token
        ],
    )
    def test_paper(self, prompt, query):
        assert self._found(prompt, "paper") == query

    @pytest.mark.parametrize(
        ("prompt", "query"), [("SuabII|ESy", "ab"), ("SuII|aESybESucdESy", "cd"), ("SsxESuaII|bESy", "ab")]
    )
    def test_turn(self, prompt, query):
        assert self._found(prompt, "turn") == query

    @pytest.mark.parametrize("prompt", ["SuII|abcES", "II|abcS", "SuabESuII|ES"])
    def test_last(self, prompt):
        ids = [ord(letter) for letter in prompt]
        tokens = PromptTokens(image=ord("I"), video=None, vision_end=None, im_start=None, im_end=None)
        assert query_range(ids, [prompt.index("I")], tokens, "last") == [len(prompt) - 1]

    def test_turn_without_a_user_turn_is_an_error(self):
        with pytest.raises(ParityError, match="user turn"):
            self._found("II|abc", "turn")

    def _found(self, prompt, query):
        ids = [ord(letter) for letter in prompt]
        tokens = PromptTokens(
            image=ord("I"), video=None, vision_end=ord("|"), im_start=ord("S"), im_end=ord("E"), user=(ord("u"),)
        )
        visual = [place for place, letter in enumerate(prompt) if letter == "I"]
        return "".join(prompt[place] for place in query_range(ids, visual, tokens, query))


def test_text_after_a_long_video_starts_after_its_time_axis():
    video = VisualItem(is_video=True, grid=(3, 1, 2), seconds=1.5)
    positions = mrope_positions([-1, 0, 0, 0, 0, 0, 0, -1], [video], tokens_per_second=2)
    assert [p[0] for p in positions] == [0, 1, 1, 4, 4, 7, 7, 8]
    assert [p[2] for p in positions] == [0, 1, 2, 1, 2, 1, 2, 8]


def test_an_image_ignores_the_time_axis():
    image = VisualItem(is_video=False, grid=(1, 2, 2))
    assert mrope_positions([0, 0, 0, 0, -1], [image], tokens_per_second=2) == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 1],
        [2, 2, 2],
    ]


def test_counts_at_rounding_edges_follow_the_float64_product():
    assert num_kept(50, PruningConfig(keep_ratio=0.3)) == 15
    assert num_kept(3, PruningConfig(keep_ratio=0.01, min_visual_tokens=8)) == 3
    assert num_kept(100, PruningConfig(keep_ratio=0.01, min_visual_tokens=8)) == 8


def test_the_lower_index_wins_a_tie():
    assert keep_best([1.0, 2.0, 2.0, 2.0, 0.0], [0] * 5, PruningConfig(keep_ratio=0.4)) == [1, 2]


def test_a_quota_keeps_some_of_every_group():
    scores = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0]
    assert keep_best(scores, [0] * 6, PruningConfig(keep_ratio=0.5)) == [0, 1, 2]
    assert keep_best(scores, [0, 0, 0, 0, 1, 1], PruningConfig(keep_ratio=0.5)) == [0, 1, 5]


def test_frames_count_through_all_images_and_videos():
    items = [VisualItem(False, (1, 1, 2)), VisualItem(True, (3, 1, 2)), VisualItem(False, (1, 1, 1))]
    kinds = [-1, 0, 0, -1, 1, 1, 1, 1, 1, 1, 2]
    assert frame_numbers(kinds, items) == [-1, 0, 0, -1, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("quota", ["global", "per-image", "per-frame"])
def test_each_frame_of_a_video_keeps_its_share(l2_reference, quota):
    _, inputs, pruning = _case("10_video_4x8x8_k030")  # 4 frames of 16 tokens
    trace = l2_reference.run(l2_reference.embed(inputs, TOKENS), replace(pruning, quota=quota))
    shares = np.bincount(trace.kept_visual // 16, minlength=4).tolist()
    assert sum(shares) == 20
    assert (shares == [5, 5, 5, 5]) == (quota == "per-frame")


def test_a_partly_masked_image_keeps_the_positions_of_its_grid(l2_reference):
    _, inputs, pruning = _case("00_img_8x8_k050_uniform")
    mask = np.ones_like(inputs.input_ids)
    mask[0, 16:19] = 0  # three placeholders of the first row of the 4 x 4 grid
    whole = l2_reference.embed(inputs, TOKENS)
    part = l2_reference.embed(ModelInputs(inputs.input_ids, mask, inputs.pixel_values, inputs.image_grid_thw), TOKENS)
    shown = np.flatnonzero(mask[0])
    np.testing.assert_array_equal(part.position_ids, whole.position_ids[:, shown])
    np.testing.assert_array_equal(part.embeds, whole.embeds[shown])
    trace = l2_reference.run(part, pruning)
    assert trace.scores.shape == (13,) and not set(trace.kept_indices) & {16, 17, 18}
