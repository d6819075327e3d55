"""Sizes that a message asks for, of one image or video: the rules of qwen-vl-utils."""

import numpy as np
import pytest

from hawk_trt import Pipeline
from hawk_trt.errors import InvalidInput
from hawk_trt.models.qwen_patches import smart_resize

IMAGE = np.random.default_rng(0).integers(0, 256, (224, 280, 3), np.uint8)
FRAMES = [IMAGE, IMAGE[::-1], IMAGE[:, ::-1], IMAGE]
PATCH, FACTOR = 14, 28


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def prepared(pipe, *items, **options):
    question = {"type": "text", "text": "Which?"}
    return pipe.prepare([{"role": "user", "content": [*items, question]}], **options)


def grid(height, width):
    return [1, height // PATCH, width // PATCH]


@pytest.mark.parametrize(
    ("sizes", "target"),
    [
        ({}, (224, 280)),
        ({"max_pixels": 30_000}, smart_resize(224, 280, FACTOR, 3136, 30_000)),
        ({"min_pixels": 100_000}, smart_resize(224, 280, FACTOR, 100_000, 200_704)),
        ({"resized_height": 110, "resized_width": 170}, (112, 168)),
        ({"resized_height": 112, "resized_width": 112, "max_pixels": 3200}, smart_resize(112, 112, FACTOR, 3136, 3200)),
    ],
)
def test_an_image_has_the_size_that_its_item_asks_for(pipe, sizes, target):
    inputs = prepared(pipe, {"type": "image", "image": IMAGE, **sizes})
    assert inputs.image_grid_thw.tolist() == [grid(*target)]


def test_images_of_one_prompt_have_sizes_of_their_own(pipe):
    plain = {"type": "image", "image": IMAGE}
    small = plain | {"max_pixels": 30_000}
    both = prepared(pipe, plain, small, plain)
    alone = [prepared(pipe, item) for item in (plain, small, plain)]
    np.testing.assert_array_equal(both.image_grid_thw, np.concatenate([one.image_grid_thw for one in alone]))
    np.testing.assert_array_equal(both.pixel_values, np.concatenate([one.pixel_values for one in alone]))


def test_an_items_bounds_count_before_the_prompts(pipe):
    own = {"type": "image", "image": IMAGE, "max_pixels": 30_000}
    inputs = prepared(pipe, own, {"type": "image", "image": IMAGE}, max_pixels=20_000)
    targets = [smart_resize(224, 280, FACTOR, 3136, most) for most in (30_000, 20_000)]
    assert inputs.image_grid_thw.tolist() == [grid(*target) for target in targets]


def test_bounds_that_exclude_each_other_are_refused(pipe):
    with pytest.raises(InvalidInput, match="min_pixels, max_pixels: got 9000 and 5000"):
        prepared(pipe, {"type": "image", "image": IMAGE, "min_pixels": 9000, "max_pixels": 5000})


@pytest.mark.parametrize(
    ("sizes", "target"),
    [
        ({"max_pixels": 30_000}, smart_resize(224, 280, FACTOR, 3136, 30_000)),
        ({"resized_height": 56, "resized_width": 84}, (56, 84)),
        ({"total_pixels": 40_000}, smart_resize(224, 280, FACTOR, 3136, 40_000 * 2 // 4)),
        ({"total_pixels": 10**9}, (224, 280)),
    ],
)
def test_the_frames_of_a_video_have_the_size_that_its_item_asks_for(pipe, sizes, target):
    inputs = prepared(pipe, {"type": "video", "video": FRAMES, **sizes})
    assert inputs.video_grid_thw.tolist() == [[2, *grid(*target)[1:]]]
