"""Patches against the image processor of transformers, bit for bit."""

import itertools
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.inputs.images import load_image, resize
from hawk_trt.models.qwen2_5_vl import Qwen25VL
from hawk_trt.models.qwen_patches import smart_resize
from pictures import NATURAL
from vision_configs import QWEN2_5_VL

FAMILY = Qwen25VL(QWEN2_5_VL)
TINY = Path(__file__).parents[2] / "examples" / "tiny-vlm"
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 400_000}
BICUBIC = 3
SIZES = [
    *[(28, 28), (56, 84), (84, 56), (1, 1), (1, 2), (3, 5), (13, 14), (27, 29), (30, 31), (55, 57)],
    *[(100, 100), (224, 224), (333, 500), (500, 333), (480, 640), (640, 480), (600, 1001), (1001, 600)],
    *[(1, 200), (200, 1), (5, 1000), (1000, 5), (13, 2600), (2600, 13), (28, 5600), (41, 2000)],
    *[(1080, 1920), (1920, 1080), (719, 1279), (2000, 41), (98, 1960)],
]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def settings_of(**changes):
    return FAMILY.image_settings(BOUNDS | changes)


def theirs(images, **arguments):
    """pixel_values and grid of transformers' PIL backend."""
    processor = Qwen2VLImageProcessorPil(**(BOUNDS | arguments))
    features = processor([Image.fromarray(image) for image in images], return_tensors="np")
    return features["pixel_values"], features["image_grid_thw"]


@pytest.mark.parametrize(
    "image",
    [*itertools.starmap(noise, SIZES), *map(load_image, NATURAL)],
    ids=[*map(str, SIZES), *(path.name for path in NATURAL)],
)
def test_patches_equal_transformers_bit_for_bit(image):
    ours = FAMILY.images_to_patches([image], settings_of())
    grid = ours.grid_thw[0].tolist()
    resized = resize(image, grid[1] * 14, grid[2] * 14, BICUBIC)
    pixels, their_grid = theirs([image])
    assert their_grid.tolist() == [grid]
    if not np.array_equal(np.asarray(Image.fromarray(image).resize(resized.shape[1::-1], BICUBIC)), resized):
        # This Pillow resizes such an image height first (see images.resize): give transformers the resized one.
        assert int(PIL.__version__.split(".")[0]) >= 13
        pixels, their_grid = theirs([resized])
        assert their_grid.tolist() == [grid]
    np.testing.assert_array_equal(ours.pixel_values, pixels)


def test_most_sizes_are_compared_with_the_whole_processor_of_transformers():
    whole = 0
    for height, width in SIZES:
        ours = FAMILY.images_to_patches([noise(height, width)], settings_of())
        whole += np.array_equal(ours.pixel_values, theirs([noise(height, width)])[0])
    assert whole >= 15


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_resizing_goes_through_the_width_first_whatever_pillow_prefers(resample):
    image = noise(300, 100)
    expected = Image.fromarray(image).resize((112, 300), resample).resize((112, 280), resample)
    np.testing.assert_array_equal(resize(image, 280, 112, resample), expected)


def test_several_images_follow_each_other():
    images = [noise(100, 60), noise(56, 56, 1), noise(28, 200, 2)]
    ours = FAMILY.images_to_patches(images, settings_of())
    alone = [FAMILY.images_to_patches([image], settings_of()) for image in images]
    np.testing.assert_array_equal(ours.pixel_values, np.concatenate([p.pixel_values for p in alone]))
    np.testing.assert_array_equal(ours.grid_thw, np.concatenate([p.grid_thw for p in alone]))


def test_no_image_makes_no_patch():
    ours = FAMILY.images_to_patches([], settings_of())
    assert (ours.pixel_values.shape, ours.grid_thw.shape) == ((0, 1176), (0, 3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
    ],
)
def test_other_normalisations_equal_transformers_too(arguments):
    image = noise(60, 90)
    ours = FAMILY.images_to_patches([image], settings_of(**arguments))
    pixels, _ = theirs([image], **arguments)
    np.testing.assert_array_equal(ours.pixel_values, pixels)


@pytest.mark.parametrize(("patch", "merge", "together"), [(16, 2, 2), (14, 1, 2), (8, 4, 1), (4, 3, 3)])
def test_other_patch_sizes_equal_transformers_too(patch, merge, together):
    sizes = {"patch_size": patch, "spatial_merge_size": merge, "temporal_patch_size": together}
    family = Qwen25VL(msgspec.structs.replace(QWEN2_5_VL, **sizes))
    block = patch * merge
    image = noise(6 * block, 8 * block)  # whole blocks: nothing is resized
    ours = family.images_to_patches([image], settings_of())
    pixels, grid = theirs([image], patch_size=patch, merge_size=merge, temporal_patch_size=together)
    np.testing.assert_array_equal(ours.grid_thw, grid)
    np.testing.assert_array_equal(ours.pixel_values, pixels)


def test_the_demo_checkpoints_own_processor_agrees():
    preprocessor = json.loads((TINY / "preprocessor_config.json").read_text())
    image = noise(231, 345)
    ours = FAMILY.images_to_patches([image], FAMILY.image_settings(preprocessor))
    features = Qwen2VLImageProcessorPil.from_pretrained(TINY)(Image.fromarray(image), return_tensors="np")
    np.testing.assert_array_equal(ours.grid_thw, features["image_grid_thw"])
    np.testing.assert_array_equal(ours.pixel_values, features["pixel_values"])


sides = st.integers(1, 20_000)


@settings(max_examples=500, deadline=None)
@given(sides, sides, st.sampled_from([14, 28, 32]), st.integers(1, 10**6), st.integers(0, 2 * 10**7))
def test_smart_resize_equals_transformers_and_refuses_what_it_refuses(height, width, factor, smallest, more):
    bounds = (factor, smallest, smallest + more)
    try:
        expected = their_smart_resize(height, width, *bounds)
    except ValueError:
        with pytest.raises(InvalidInput, match="1 to 200"):
            smart_resize(height, width, *bounds)
        return
    assert smart_resize(height, width, *bounds) == expected


def test_the_pixel_bounds_are_read_by_every_spelling():
    def bounds(**preprocessor):
        read = FAMILY.image_settings(preprocessor)
        return read.min_pixels, read.max_pixels

    assert bounds(min_pixels=3136, max_pixels=12845056) == (3136, 12845056)
    assert bounds(size={"shortest_edge": 3136, "longest_edge": 200704}) == (3136, 200704)
    assert bounds(size={"min_pixels": 3136, "max_pixels": 200704}) == (3136, 200704)
    assert bounds(min_pixels=4000, size={"shortest_edge": 3136, "longest_edge": 200704}) == (4000, 200704)
    assert bounds(min_pixels=None, size={"shortest_edge": 3136, "longest_edge": 200704}) == (3136, 200704)
    theirs = Qwen2VLImageProcessorPil()
    assert bounds() == (theirs.size["shortest_edge"], theirs.size["longest_edge"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_pixels": 0}, ("min_pixels", "0")),
        ({"max_pixels": "many"}, ("max_pixels", "'many'")),
        ({"min_pixels": 500_000}, ("min_pixels", "500000", "400000")),
        ({"resample": 9}, ("resample", "9", "0 to 5")),
        ({"image_mean": [0.5, 0.5]}, ("image_mean", "[0.5, 0.5]", "three")),
        ({"image_std": [0.5, 0.0, 0.5]}, ("image_std", "above 0")),
        ({"do_resize": False}, ("do_resize", "False")),
        ({"patch_size": 16}, ("patch_size", "16", "14, as vision_config")),
        ({"merge_size": 4}, ("merge_size", "4", "2, as vision_config")),
    ],
)
def test_unusable_preprocessor_settings_are_refused_by_name(changes, words):
    with pytest.raises(CheckpointError) as error:
        settings_of(**changes)
    assert all(word in str(error.value) for word in ("preprocessor_config.json", *words))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_video_frames_pair_up_and_the_last_one_fills_its_pair(count):
    frames = [noise(90, 70, seed) for seed in range(count)]
    ours = FAMILY.video_to_patches(frames, settings_of())
    steps = math.ceil(count / 2)
    # A frame's rows among those of an image of it alone: the image fills both temporal places with itself.
    alone = [FAMILY.images_to_patches([frame], settings_of()) for frame in frames]
    rows = np.stack([p.pixel_values.reshape(-1, 3, 2, 196)[:, :, 0] for p in alone])
    padded = np.concatenate((rows, rows[-1:])) if count % 2 else rows
    expected = padded.reshape(steps, 2, -1, 3, 196).transpose(0, 2, 3, 1, 4).reshape(-1, 1176)
    assert ours.grid_thw.tolist() == [[steps, *alone[0].grid_thw[0, 1:].tolist()]]
    np.testing.assert_array_equal(ours.pixel_values, expected)


def test_a_still_video_equals_its_image():
    frame = noise(100, 60)
    video = FAMILY.video_to_patches([frame, frame], settings_of())
    image = FAMILY.images_to_patches([frame], settings_of())
    np.testing.assert_array_equal(video.pixel_values, image.pixel_values)
    np.testing.assert_array_equal(video.grid_thw, image.grid_thw)


def test_videos_have_pixel_bounds_of_their_own():
    frame = noise(200, 200)
    small = FAMILY.video_to_patches([frame], settings_of(max_pixels=56 * 56))
    assert small.grid_thw.tolist() == [[1, 4, 4]]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([np.zeros((10, 2001, 3), np.uint8)], ("2001 x 10", "1 to 200", "Crop")),
        ([np.zeros((10, 10), np.uint8)], ("uint8[10, 10]", "uint8[height, width, 3]")),
        ([np.zeros((10, 10, 3), np.float32)], ("float32[10, 10, 3]",)),
        ([np.zeros((0, 10, 3), np.uint8)], ("uint8[0, 10, 3]",)),
    ],
)
def test_images_that_cannot_be_cut_are_refused(images, words):
    for method in (FAMILY.images_to_patches, FAMILY.video_to_patches):
        with pytest.raises(InvalidInput) as error:
            method(images, settings_of())
        assert all(word in str(error.value) for word in words), str(error.value)


def test_frames_of_two_sizes_are_refused_by_number():
    with pytest.raises(InvalidInput, match=r"frame 1 is \[60, 50, 3\], expected \[50, 60, 3\]"):
        FAMILY.video_to_patches([noise(50, 60), noise(60, 50)], settings_of())
    with pytest.raises(InvalidInput, match="no frame"):
        FAMILY.video_to_patches([], settings_of())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA"])
def test_every_mode_goes_through_as_in_transformers(mode):
    picture = Image.fromarray(noise(60, 90))
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(noise(60, 90, 1)[:, :, 0]))
    elif mode in ("LA", "PA"):
        picture = picture.convert("L" if mode == "LA" else "P")
        picture.putalpha(Image.fromarray(noise(60, 90, 1)[:, :, 0]))
        assert picture.mode == mode
    else:
        picture = picture.convert(mode)
    ours = FAMILY.images_to_patches([load_image(picture)], settings_of())
    features = Qwen2VLImageProcessorPil(**BOUNDS)(picture, return_tensors="np")
    np.testing.assert_array_equal(ours.pixel_values, features["pixel_values"])
