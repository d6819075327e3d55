"""InternVL's tiles are those of transformers' processor, bit for bit."""

import msgspec
import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.inputs.images import load_image, resize
from hawk_trt.models.internvl import InternVL, tile_grid
from pictures import NATURAL, noise
from vision_configs import INTERNVL

FAMILY = InternVL(INTERNVL)
BICUBIC = 3
PREPROCESSOR = {
    "size": {"height": 448, "width": 448},
    "crop_to_patches": False,  # as the checkpoints say; their processors cut all the same
    "min_patches": 1,
    "max_patches": 12,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
}
# Height and width: small and large, square and long, exact tiles and one pixel off, ties of the aspect ratio.
SIZES = [
    (1, 1), (448, 448), (447, 449), (224, 224), (300, 500), (500, 300), (896, 448), (448, 896), (897, 447),
    (640, 480), (480, 640), (720, 1280), (1280, 720), (1080, 1920), (600, 1200), (601, 1200), (1000, 250),
    (100, 1000), (1000, 100), (60, 2000), (2000, 60), (1344, 1792), (1792, 1344), (1600, 1600), (800, 1000),
    (317, 317), (633, 634), (951, 635), (333, 777), (1200, 900), (512, 512), (64, 48),
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")


def tiles_of(module, image, *, crop=True):
    """Their tiles of an image."""
    processor = module.GotOcr2ImageProcessorPil(**{**PREPROCESSOR, "crop_to_patches": crop})
    features = processor(Image.fromarray(image), return_tensors="np")
    assert features["num_patches"][0] == len(features["pixel_values"])
    return np.stack(list(features["pixel_values"]))


def height_first(image, height, width):
    """Whether this Pillow resizes such an image height first, which images.resize never does."""
    direct = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return not np.array_equal(direct, resize(image, height, width, Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "image",
    [*(noise(*size, sum(size)) for size in SIZES), *map(load_image, NATURAL)],
    ids=[*map(str, SIZES), *(path.name for path in NATURAL)],
)
def test_tiles_are_those_of_transformers_bit_for_bit(theirs, image):
    height, width, _ = image.shape
    ours = FAMILY.images_to_patches([image], FAMILY.image_settings(PREPROCESSOR))
    columns, rows = tile_grid(height, width, 448, 1, 12)
    expected = tiles_of(theirs, image)
    assert ours.grid_thw.tolist() == [[len(expected), 32, 32]]
    # Where their one resize goes height first, give transformers the resized image.
    if height_first(image, rows * 448, columns * 448):
        assert int(PIL.__version__.split(".")[0]) >= 13
        whole = tiles_of(theirs, resize(image, rows * 448, columns * 448, BICUBIC))
        expected[: rows * columns] = whole[: rows * columns]
    if height_first(image, 448, 448):
        expected[-1:] = tiles_of(theirs, resize(image, 448, 448, BICUBIC), crop=False)
    np.testing.assert_array_equal(ours.pixel_values, expected)


def test_most_sizes_are_compared_with_the_whole_processor_of_transformers():
    grids = [tile_grid(height, width, 448, 1, 12) for height, width in SIZES]
    turned = [
        height_first(noise(*size), rows * 448, columns * 448) or height_first(noise(*size), 448, 448)
        for size, (columns, rows) in zip(SIZES, grids, strict=True)
    ]
    assert len(SIZES) >= 30
    assert turned.count(False) >= 20


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 16), st.integers(0, 3))
def test_the_grid_of_tiles_is_that_of_transformers(theirs, height, width, most, less):
    fewest = max(1, most - 4 * less)
    expected = theirs.get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)
    assert tile_grid(height, width, 448, fewest, most) == expected


def test_of_equally_near_grids_the_larger_is_taken_once_the_image_fills_half_of_it():
    assert tile_grid(448, 448, 448, 1, 12) == (1, 1)
    assert tile_grid(634, 634, 448, 1, 12) == (2, 2)  # 634^2 is more than half of 896^2
    assert tile_grid(633, 633, 448, 1, 12) == (1, 1)


def test_several_images_are_their_tiles_one_after_another():
    settings = FAMILY.image_settings({})
    images = [noise(500, 900), noise(100, 100), noise(900, 500)]
    together = FAMILY.images_to_patches(images, settings)
    alone = [FAMILY.images_to_patches([image], settings) for image in images]
    np.testing.assert_array_equal(together.pixel_values, np.concatenate([one.pixel_values for one in alone]))
    np.testing.assert_array_equal(together.grid_thw, np.concatenate([one.grid_thw for one in alone]))
    assert together.grid_thw[:, 0].tolist() == [3, 1, 3]


def test_a_frame_of_a_video_is_one_tile_whatever_its_shape(theirs):
    frames = [noise(300, 900, seed) for seed in range(3)]
    ours = FAMILY.video_to_patches(frames, FAMILY.image_settings(PREPROCESSOR))
    assert ours.grid_thw.tolist() == [[3, 32, 32]]
    for tile, frame in zip(ours.pixel_values, frames, strict=True):
        assert not height_first(frame, 448, 448)
        np.testing.assert_array_equal(tile, tiles_of(theirs, frame, crop=False)[0])


def test_bounds_of_pixels_are_bounds_of_tiles():
    image = noise(700, 1400)
    for most, tiles in ((6, 3), (4, 3), (2, 3), (1, 1)):
        settings = FAMILY.image_settings({"max_patches": most})
        assert settings.max_pixels == most * 448**2
        assert FAMILY.images_to_patches([image], settings).grid_thw[0, 0] == tiles
    small = FAMILY.image_settings({"min_patches": 4})
    assert FAMILY.images_to_patches([noise(50, 50)], small).grid_thw[0, 0] == 5
    family = InternVL(msgspec.structs.replace(INTERNVL, use_thumbnail=False))
    without = family.images_to_patches([image], family.image_settings({}))
    assert without.grid_thw[0, 0] == 8


def test_the_tiles_that_a_picture_shows_are_those_that_the_model_gets():
    image = noise(700, 1400)
    settings = FAMILY.image_settings({"image_mean": 0.0, "image_std": 1.0, "do_rescale": False})
    patches = FAMILY.images_to_patches([image], settings)
    shown = FAMILY.image_parts(image, int(patches.grid_thw[0, 0]))
    np.testing.assert_array_equal(np.stack(shown).transpose(0, 3, 1, 2), patches.pixel_values)


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"size": {"height": 384, "width": 384}}, r"size: got .*384.*, expected tiles of 448 x 448 pixels"),
        ({"size": {"height": 448, "width": 224}}, "expected tiles of 448 x 448"),
        ({"max_patches": 0}, "max_patches: got 0, expected a number of tiles"),
        ({"min_patches": 5, "max_patches": 4}, "expected at most max_pixels"),
        ({"do_resize": False}, "do_resize: got False"),
    ],
)
def test_settings_that_cannot_be_used_are_named(preprocessor, message):
    with pytest.raises(CheckpointError, match=message):
        FAMILY.image_settings(preprocessor)


def test_what_is_no_image_is_refused():
    settings = FAMILY.image_settings({})
    with pytest.raises(InvalidInput, match=r"got uint8\[4, 4\], expected uint8\[height, width, 3\]"):
        FAMILY.images_to_patches([np.zeros((4, 4), np.uint8)], settings)
    with pytest.raises(InvalidInput, match="expected at least one"):
        FAMILY.video_to_patches([], settings)


def test_frames_are_the_middles_of_equal_parts_as_transformers_takes_them():
    torch = pytest.importorskip("torch")
    for total, count in ((8, 8), (100, 8), (37, 8), (250, 8), (3, 3), (1, 1)):
        expected = torch.arange(total / count / 2, total, total / count).int().tolist()
        assert FAMILY.frame_numbers(total, 25.0, None, 768).tolist() == expected
    assert FAMILY.frame_numbers(100, 25.0, 2.0, 768).tolist() == [6, 18, 31, 43, 56, 68, 81, 93]
    assert len(FAMILY.frame_numbers(1000, 10.0, 2.0, 16)) == 16
    assert FAMILY.frame_numbers(5, 25.0, 0.1, 768).tolist() == [2]
