"""mRoPE positions against the authors' model, transformers, and the documented rule."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLModel

import golden
from export.architectures import read_config
from hawk_trt.errors import InvalidInput
from hawk_trt.models.qwen2_5_vl import Qwen25VL
from vision_configs import QWEN2_5_VL

FAMILY = Qwen25VL(QWEN2_5_VL)
NO_GRID = np.empty((0, 3), np.int64)
NO_SECONDS = np.empty(0, np.float32)


def positions(kind, images=NO_GRID, videos=NO_GRID, seconds=NO_SECONDS, family=FAMILY):
    images, videos = np.array(images, np.int64), np.array(videos, np.int64)
    return family.position_ids(np.array(kind, np.int8), images, videos, np.array(seconds, np.float32))


@pytest.mark.parametrize("name", golden.CASES)
def test_positions_equal_the_authors_model(name):
    case = golden.load_case(name)
    family = Qwen25VL(read_config(json.loads((golden.MODEL / "config.json").read_text())).vision)
    real = case.inputs["attention_mask"][0] == 1
    videos = case.inputs.get("video_grid_thw", NO_GRID)
    seconds = case.inputs.get("second_per_grid_ts", np.ones(len(videos)))
    images = case.inputs.get("image_grid_thw", NO_GRID)
    got = positions(case.mm_token_type_ids[0, real], images, videos, seconds, family)
    np.testing.assert_array_equal(got, case.expected["position_ids"][:, 0, real])


@st.composite
def image_prompts(draw):
    """Kinds and grids of a prompt where text lies between the images."""
    kind, grids = [0] * draw(st.integers(0, 5)), []
    for _ in range(draw(st.integers(0, 4))):
        high, wide = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        grids.append((1, 2 * high, 2 * wide))
        kind += [1] * (high * wide) + [0] * draw(st.integers(1, 4))
    return kind or [0], np.array(grids, np.int64).reshape(-1, 3)


@settings(max_examples=50, deadline=None)
@given(image_prompts())
def test_image_positions_equal_transformers(prompt):
    kind, grids = prompt
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)),
    )
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    types = torch.tensor([kind])
    theirs, _ = Qwen2_5_VLModel.get_rope_index(
        model, torch.zeros_like(types), types, image_grid_thw=torch.tensor(grids) if len(grids) else None
    )
    np.testing.assert_array_equal(positions(kind, grids), theirs[:, 0].numpy())


def test_text_alone_counts_up_on_every_axis():
    np.testing.assert_array_equal(positions([0] * 5), np.tile(np.arange(5), (3, 1)))
    assert positions([]).shape == (3, 0)


def test_two_images_without_text_between_them_are_told_apart_by_their_grids():
    got = positions([0, 1, 1, 1, 1, 1, 1, 0], [(1, 2, 4), (1, 4, 4)])
    np.testing.assert_array_equal(got[0], [0, 1, 1, 3, 3, 3, 3, 5])
    np.testing.assert_array_equal(got[1], [0, 1, 1, 3, 3, 4, 4, 5])
    np.testing.assert_array_equal(got[2], [0, 1, 2, 3, 4, 3, 4, 5])


def test_text_after_a_long_video_starts_behind_its_last_moment():
    # Four frames of 2 x 2 tokens, 1.5 s apart at two positions a second: time 0, 3, 6, 9 beats the width of 2.
    got = positions([0] + [2] * 16 + [0], videos=[(4, 4, 4)], seconds=[1.5])
    assert got[0, 1:17:4].tolist() == [1, 4, 7, 10]
    assert got[:, -1].tolist() == [11, 11, 11]


def test_fractional_seconds_are_floored_a_frame_not_a_second():
    # 0.7 s a frame: 0, 1.4, 2.8, 4.2 positions. Truncating the seconds first would leave all at 0.
    got = positions([2] * 4, videos=[(4, 2, 2)], seconds=[0.7])
    assert got[0].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("seconds", [0.35, 0.7, 0.9, 1.1, 1.0 / 3.0])
def test_time_is_floored_in_float32_as_pytorch_does(seconds):
    torch = pytest.importorskip("torch")
    frames = 40
    got = positions([2] * frames, videos=[(frames, 2, 2)], seconds=[seconds])
    moments = torch.arange(frames) * torch.tensor(seconds, dtype=torch.float32) * 2
    assert got[0].tolist() == moments.long().tolist()


def test_images_and_videos_are_taken_from_their_own_grids():
    kind = [2, 2, 0, 1, 1, 1, 1, 0, 2]
    got = positions(kind, images=[(1, 4, 4)], videos=[(2, 2, 2), (1, 2, 2)], seconds=[1.0, 1.0])
    assert got[0].tolist() == [0, 2, 3, 4, 4, 4, 4, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": [1] * 3, "images": [(1, 4, 4)]}, ("image 0", "got 3", "expected 4")),
        ({"kind": [1, 1, 0, 1, 1], "images": [(1, 4, 4)]}, ("image 0", "got 2", "expected 4")),
        ({"kind": [2] * 2, "videos": [(2, 2, 4)], "seconds": [1.0]}, ("video 0", "got 2", "expected 4")),
    ],
)
def test_placeholders_that_do_not_follow_each_other_are_an_error_that_names_the_item(arguments, words):
    with pytest.raises(InvalidInput) as error:
        positions(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_tokens_per_item_divides_by_the_merge_block():
    grids = np.array([(1, 4, 6), (3, 2, 2)])
    assert QWEN2_5_VL.tokens_per_item(grids).tolist() == [6, 3]
    assert QWEN2_5_VL.tokens_per_item(NO_GRID).tolist() == []
