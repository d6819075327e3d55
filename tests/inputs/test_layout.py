"""Where the tokens of a prompt lie: padding, placeholders, the query, rows side by side."""

from types import SimpleNamespace

import numpy as np
import pytest

from hawk_trt import ModelInputs
from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import collate, paper_query_mask, prompt_layout
from hawk_trt.models import load_family
from hawk_trt.stages import BIAS_DROP, BIAS_KEEP
from vision_configs import QWEN2_5_VL

SPECIAL = SpecialTokens(image=9, video=8, vision_start=6, vision_end=7, im_start=4, im_end=5, pad=0, eos=(5,))
FAMILY = load_family(QWEN2_5_VL)
IMAGE = [6, 9, 9, 9, 9, 7]  # a 4 x 4 grid
GRID = np.array([[1, 4, 4]])
ONE_VIDEO = {"ids": [6, 8, 8, 8, 8, 7], "images": None, "video_grid_thw": GRID}


def layout(ids, mask=None, images=GRID, query=None, chat=None, **videos):
    inputs = ModelInputs(input_ids=ids, attention_mask=mask, image_grid_thw=images, **videos)
    return prompt_layout(inputs, FAMILY, SPECIAL, query, chat)


def test_padding_is_left_out_wherever_it_stands():
    plain = layout([4, *IMAGE, 1, 2, 5])
    for ids, mask in (
        ([0, 0, 4, *IMAGE, 1, 2, 5], [0, 0] + [1] * 10),
        ([4, *IMAGE, 1, 2, 5, 0, 0], [1] * 10 + [0, 0]),
        ([4, 3, *IMAGE, 1, 2, 5], [1, 0] + [1] * 9),
    ):
        padded = layout(ids, mask)
        np.testing.assert_array_equal(padded.input_ids, plain.input_ids)
        np.testing.assert_array_equal(padded.position_ids, plain.position_ids)
        np.testing.assert_array_equal(padded.query_weights, plain.query_weights)
        np.testing.assert_array_equal(padded.source_index, np.flatnonzero(mask))
        assert padded.next_position == plain.next_position


def test_an_image_that_is_masked_whole_takes_neither_tokens_nor_positions():
    ids = [4, *IMAGE, 1, *IMAGE, 2, 5]
    mask = [1] + [0] * 6 + [1] * 9
    both = np.array([[1, 4, 4], [1, 4, 4]])
    masked, alone = layout(ids, mask, both), layout([4, 1, *IMAGE, 2, 5])
    np.testing.assert_array_equal(masked.position_ids, alone.position_ids)
    assert masked.num_visual == 4
    assert masked.num_rows == 8
    assert masked.visual_rows[masked.visual_rows >= 0].tolist() == [4, 5, 6, 7]


def test_a_masked_placeholder_is_no_visual_token_and_moves_no_other():
    whole, partial = layout([4, *IMAGE, 1, 5]), layout([4, *IMAGE, 1, 5], [1, 1, 1, 0, 1, 1, 1, 1, 1])
    assert partial.num_visual == 3
    assert partial.visual_rows.tolist() == [-1, -1, 0, 2, 3, -1, -1, -1]
    np.testing.assert_array_equal(partial.position_ids, whole.position_ids[:, partial.source_index])


def test_rows_count_images_before_videos_whatever_their_order_in_the_prompt():
    ids = [6, 8, 8, 8, 8, 7, *IMAGE, 5]
    mixed = layout(ids, video_grid_thw=[[1, 4, 4]], second_per_grid_ts=[1.0])
    assert mixed.visual_rows[mixed.visual_rows >= 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert mixed.items[mixed.items >= 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([4, *IMAGE, 1, 2, 5, 4, 3], [7, 8]),  # image, then the question
        ([4, 1, *IMAGE, 5, 4, 3], [8, 9, 10]),  # im_end right behind the image is not strictly later
        ([4, 1, 2, *IMAGE], [8]),  # nothing behind: the vision_end itself
        ([4, *IMAGE, 1, *IMAGE, 2, 3, 5], [14, 15]),  # only the text after the last image
        ([4, *IMAGE, 1, 5, 4, 2, 5, 3], [7, 8, 9, 10]),  # up to the last im_end
        ([6, 9, 9, 9, 9, 1, 2], [5, 6]),  # without a vision_end: behind the last visual token
        ([1, 6, 9, 9, 9, 9], [5]),  # and with nothing there: that token
    ],
)
def test_the_papers_query_range(ids, expected):
    visual = np.array(ids) == 9
    assert np.flatnonzero(paper_query_mask(np.array(ids), visual, SPECIAL)).tolist() == expected


def test_query_weights_are_a_mean_over_the_query():
    weights = layout([4, *IMAGE, 1, 2, 3, 5]).query_weights
    assert weights.dtype == np.float32
    assert np.flatnonzero(weights).tolist() == [7, 8, 9]
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_a_prompt_without_images_asks_nothing():
    assert not layout([4, 1, 2, 5], images=None).query_weights.any()


def test_the_turn_query_takes_what_the_tokenizer_marks():
    chat = SimpleNamespace(turns=lambda ids: [("user", np.flatnonzero(ids == 1))])
    marked = layout([1, *IMAGE, 2, 5], query="turn", chat=chat)
    assert np.flatnonzero(marked.query_weights).tolist() == [0]
    with pytest.raises(InvalidInput, match='"turn" needs a tokenizer'):
        layout([1, *IMAGE, 2, 5], query="turn")


@pytest.mark.parametrize("mask", [None, [1] * 8 + [0] * 2])
def test_the_last_query_takes_the_last_token_that_is_real_and_needs_no_tokenizer(mask):
    marked = layout([4, *IMAGE, 1, 5, 3], mask, query="last")
    assert np.flatnonzero(marked.query_weights).tolist() == [len(marked.input_ids) - 1]
    assert (marked.query, marked.query_weights[-1], len(marked.input_ids)) == ("last", 1.0, 10 if mask is None else 8)
    assert not layout([4, 1, 2, 5], images=None, query="last").query_weights.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "input_ids: got no token"),
        ({"ids": [[1, 2], [3, 4]]}, r"got int64\[2, 2\]"),
        ({"ids": [1.5, 2.0]}, "got float64"),
        ({"mask": [0] * 9}, "padding only"),
        ({"mask": [1] * 4}, "attention_mask: got 4 values, expected 9"),
        ({"images": None}, "got 4 image placeholders, expected 0"),
        ({"images": [[1, 4, 4], [1, 2, 2]]}, "got 4 image placeholders, expected 5"),
        ({"images": [[1, 4]]}, r"image_grid_thw: got int64\[1, 2\], expected int64\[items, 3\]"),
        ({"images": [4, 4]}, r"image_grid_thw: got int64\[2\], expected int64\[items, 3\]"),
        ({"images": [[1.0, 4.0, 4.0]]}, "image_grid_thw: got float64"),
        ({"images": [[1, 0, 4]]}, r"image_grid_thw\[0\]: got \[1, 0, 4\], expected at least one frame"),
        ({"images": [[0, 4, 4]]}, r"image_grid_thw\[0\]: got \[0, 4, 4\], expected at least one frame"),
        ({"images": [[1, 4, 3]]}, r"image_grid_thw\[0\]: got \[1, 4, 3\], expected .* multiples of 2"),
        ({"ids": [4, *IMAGE, 9, 5]}, "got 5 image placeholders, expected 4"),
        ({"ids": [4, 9, 9, 1, 9, 9, 5]}, "image 0: got 2 placeholders in a row, expected 4"),
        ({"ids": [8, *IMAGE, 1, 5]}, "got 1 video placeholders, expected 0"),
        ({"second_per_grid_ts": [1.0]}, "expected 0 finite seconds"),
        ({**ONE_VIDEO, "second_per_grid_ts": [np.nan]}, "nan"),
        ({**ONE_VIDEO, "second_per_grid_ts": [-1.0]}, "-1.0"),
        ({**ONE_VIDEO, "second_per_grid_ts": []}, "expected 1 finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(change, message):
    arguments = {"ids": [4, *IMAGE, 1, 5]} | change
    with pytest.raises(InvalidInput, match=message):
        layout(**arguments)


def test_rows_of_a_batch_are_left_padded_so_that_all_keep_as_many_tokens():
    short, long = layout([1, 2], images=None), layout([4, *IMAGE, 1, 2, 5])
    weights = np.ones(2, np.float32)
    inputs = collate([short, long], [0, 1], [None, None], weights)
    assert inputs.num_kept_total == 7
    assert inputs.source_rows.shape == (2, 10)
    assert inputs.kv_start.tolist() == [5, 0]
    assert inputs.pads.tolist() == [8, 0]
    keep, drop = np.float32(BIAS_KEEP), np.float32(BIAS_DROP)
    # five of the eight padding tokens of the short row are kept, next to its own two
    assert inputs.select_bias[0].tolist() == [drop] * 3 + [keep] * 7
    assert inputs.select_bias[1].tolist() == [keep] * 2 + [0] * 4 + [keep] * 4
    assert (inputs.select_bias == keep).sum(axis=1).max() <= inputs.num_kept_total
    np.testing.assert_array_equal(inputs.position_ids[:, 1], long.position_ids)


def test_a_batch_is_padded_beyond_its_longest_row_where_kept_counts_ask_for_it():
    # the long row drops nearly all, the short one keeps everything: 6 real tokens against 8 of the other
    long, short = layout([*IMAGE, 1, 2]), layout([1, 1, 1, 1, 1, 1, 1], images=None)
    inputs = collate([long, short], [1, 0], [None, None], np.ones(1, np.float32))
    assert inputs.num_kept_total == 7
    assert inputs.source_rows.shape[1] == 10
    for row, total in enumerate((5, 7)):
        kept_padding = (inputs.select_bias[row, : inputs.pads[row]] > 0).sum()
        assert kept_padding == inputs.num_kept_total - total


def test_rows_of_a_batch_count_through_visual_tokens_and_text():
    prompts = [layout([*IMAGE, 1]), layout([4, *IMAGE, 2])]
    inputs = collate(prompts, [4, 4], [None, None], np.ones(1, np.float32))
    rows = inputs.source_rows
    assert rows[rows >= 0].tolist() == list(range(8))
    # each prompt's text in its order, between it the tokens that begin and end an image
    told = [prompt.input_ids[prompt.visual_rows < 0].tolist() for prompt in prompts]
    for row, pad, ids in zip(rows, inputs.pads, told, strict=True):
        assert inputs.text_ids[-1 - row[pad:][row[pad:] < 0]].tolist() == ids
    assert len(inputs.text_ids) == sum(map(len, told))


def test_padding_reads_its_own_prompts_text_and_a_batch_without_any_one_dummy_row():
    short, long = layout([1, 2], images=None), layout([4, *IMAGE, 1, 2, 5])
    inputs = collate([long, short], [1, 0], [None, None], np.ones(1, np.float32))
    padding = inputs.source_rows[1, : inputs.pads[1]]
    assert len(padding) and set(inputs.text_ids[-1 - padding]) == {1}
    only_visual = layout(IMAGE[1:5])
    assert only_visual.num_visual == only_visual.num_tokens
    inputs = collate([only_visual], [4], [None], np.ones(1, np.float32))
    assert (len(inputs.text_ids), inputs.source_rows.tolist()) == (1, [[0, 1, 2, 3]])


def test_a_choice_made_on_the_host_becomes_a_bias():
    prompt = layout([*IMAGE, 1])
    chosen = np.array([True, False, False, True])
    bias = collate([prompt], [2], [chosen], np.ones(1, np.float32)).select_bias[0]
    np.testing.assert_array_equal(bias[1:5] > 0, chosen)
    assert (np.abs(bias) >= np.float32(BIAS_KEEP)).all()
