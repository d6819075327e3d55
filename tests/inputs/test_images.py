"""Images as users bring them: formats, modes, orientation, and what cannot be one."""

import base64
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import MAX_PIXELS, load_image

NOISE = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (31, 47), dtype=np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode):
    """The noise as a PIL image of a mode."""
    image = Image.fromarray(NOISE)
    if mode in ("RGBA", "LA", "PA"):
        image = image.convert(mode.removesuffix("A"))
        image.putalpha(Image.fromarray(ALPHA))
        return image
    return image.convert(mode)


def their_rgb(image):
    """What transformers' processor makes of a PIL image before resizing."""
    return Qwen2VLImageProcessorPil().process_image(image, do_convert_rgb=True).transpose(1, 2, 0)


def png_header(width, height):
    """A PNG that states a size and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(NOISE)
    content = encoded(image, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (path, str(path), path.as_uri(), content, bytearray(content), url, image, NOISE):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, NOISE)


@pytest.mark.parametrize(
    "kind", ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
)
def test_every_format_of_pillow_is_read(kind):
    image = Image.fromarray(NOISE)
    content = encoded(image.convert("P") if kind == "GIF" else image, kind)
    with Image.open(io.BytesIO(content)) as plain:
        np.testing.assert_array_equal(load_image(content), their_rgb(plain))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb_as_in_transformers(mode):
    image = picture(mode)
    assert image.mode == mode
    np.testing.assert_array_equal(load_image(image), their_rgb(image))


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [
        ("P", picture("P").getpixel((0, 0))),
        ("P", bytes(range(256))),
        ("L", 128),
        ("1", 0),
        ("RGB", tuple(NOISE[0, 0].tolist())),
    ],
)
def test_a_transparent_colour_shows_white(mode, transparency):
    content = encoded(picture(mode), "PNG", transparency=transparency)
    with Image.open(io.BytesIO(content)) as plain:
        assert "transparency" in plain.info
        np.testing.assert_array_equal(load_image(content), their_rgb(plain))
        assert (np.asarray(plain.convert("RGBA"))[:, :, 3] < 255).any()


def test_transparency_is_composited_on_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (load_image(Image.fromarray(clear)) == 255).all()
    clear[..., 3] = 255
    assert (load_image(Image.fromarray(clear)) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(NOISE), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as plain:
        upright = np.asarray(ImageOps.exif_transpose(plain))
    assert upright.shape[:2] == ((31, 47) if orientation < 5 else (47, 31))
    np.testing.assert_array_equal(load_image(content), upright)


def test_an_image_turned_by_the_caller_is_not_turned_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(Image.fromarray(NOISE), "PNG", exif=exif))) as plain:
        upright = ImageOps.exif_transpose(plain)
        np.testing.assert_array_equal(load_image(upright), np.asarray(upright))
        np.testing.assert_array_equal(load_image(plain), np.asarray(upright))


def test_damaged_exif_data_do_not_lose_the_image():
    content = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage", quality=95)
    plain = encoded(Image.fromarray(NOISE), "JPEG", quality=95)
    np.testing.assert_array_equal(load_image(content), load_image(plain))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    grey = np.linspace(0, 65535, 31 * 47).reshape(31, 47).astype(np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey.astype(np.int32))
    assert image.mode == mode
    expected = np.repeat(np.round(grey / 257.0).astype(np.uint8)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(load_image(image), expected)
    if mode == "I;16":
        np.testing.assert_array_equal(load_image(encoded(image, "PNG")), expected)
        np.testing.assert_array_equal(load_image(encoded(image, "TIFF")), expected)


@pytest.mark.parametrize("shape", [(31, 47), (31, 47, 1), (31, 47, 3), (31, 47, 4)])
def test_arrays_of_every_shape_become_rgb(shape):
    array = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(array[:, :, 0] if shape[-1] == 1 else array)
    np.testing.assert_array_equal(load_image(array), load_image(image))
    backwards = array[::-1, ::-1]
    np.testing.assert_array_equal(load_image(backwards), load_image(image)[::-1, ::-1])


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image(content) == 10).all()


NAMED = {
    "missing": lambda folder: folder / "none.png",
    "folder": lambda folder: folder,
    "text": lambda folder: write(folder / "notes.png", b"not an image"),
    "empty": lambda folder: write(folder / "empty.png", b""),
    "cut": lambda folder: write(folder / "cut.jpg", encoded(Image.fromarray(NOISE), "JPEG")[:-200]),
    "cut png": lambda folder: write(folder / "cut.png", encoded(Image.fromarray(NOISE), "PNG")[:-500]),
    "header": lambda folder: write(folder / "header.png", png_header(40, 30)),
    "huge": lambda folder: write(folder / "huge.png", png_header(10_000, 10_000)),
    "bomb": lambda folder: write(folder / "bomb.png", png_header(60_000, 60_000)),
    "zero": lambda folder: write(
        folder / "zero.pcx", encoded(Image.fromarray(NOISE), "PPM").replace(b"47 31", b"0 31")
    ),
    "float": lambda folder: write(folder / "f.tif", encoded(Image.new("F", (4, 4)), "TIFF")),
    "deep": lambda folder: write(folder / "i.tif", encoded(Image.new("I", (4, 4), 70_000), "TIFF")),
}
EXPECTED = {
    "missing": ("none.png", "no such file"),
    "folder": ("not a file",),
    "text": ("notes.png", "not an image", "PNG or JPEG"),
    "empty": ("empty.png", "empty"),
    "cut": ("cut.jpg", "truncated"),
    "cut png": ("cut.png", "truncated"),
    "header": ("header.png", "truncated"),
    "huge": ("huge.png", "10000 x 10000", "89,478,485", "Scale it down"),
    "bomb": ("bomb.png", "89,478,485", "Scale it down"),
    "zero": ("zero.pcx",),
    "float": ("f.tif", "floating point", "8 bits"),
    "deep": ("i.tif", "32-bit", "16 bits"),
}


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_image_is_an_error_that_names_it_and_says_what_helps(tmp_path, name):
    with pytest.raises(InvalidInput) as error:
        load_image(NAMED[name](tmp_path))
    assert all(word in str(error.value) for word in EXPECTED[name]), str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", ("image (bytes)", "not an image")),
        (b"\x89PNG\r\n\x1a\n", ("image (bytes)",)),
        (png_header(10_000, 10_000), ("image (bytes)", "10000 x 10000")),
        (Image.new("RGB", (0, 5)), ("image (PIL)", "0 x 5", "at least 1 x 1")),
        (Image.new("F", (4, 4)), ("image (PIL)", "floating point")),
        (np.zeros((0, 4, 3), np.uint8), ("image (array)", "4 x 0")),
        (np.zeros((4, 4, 2), np.uint8), ("uint8[4, 4, 2]", "RGBA")),
        (np.zeros((2, 4, 4, 3), np.uint8), ("uint8[2, 4, 4, 3]",)),
        (np.zeros((4, 4, 3), np.float32), ("float32[4, 4, 3]", "uint8", "0..255")),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), ("10000 x 10000", "89,478,485")),
        ("https://host/a.png", ("https://host/a.png", "not fetched")),
        ("data:image/png;base64,%%%", ("data URL", "base64")),
        ("data:image/png,abc", ("data:image/png", "base64")),
        ("a\0b.png", ("no such file",)),
        ("x" * 10_000, ("cannot be read",)),
        (7, ("got int", "a path")),
        (None, ("got NoneType", "a path")),
    ],
)
def test_what_is_no_image_in_memory_is_an_error_too(source, words):
    with pytest.raises(InvalidInput) as error:
        load_image(source)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value)) < 500


def test_a_hundred_megapixels_are_refused_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(InvalidInput, match="100,000,000 pixels"):
        load_image(png_header(10_000, 10_000))
    with pytest.raises(InvalidInput, match="100,000,000 pixels"):
        load_image(Image.new("1", (10_000, 10_000)))


def test_the_bound_is_pillows_own_and_its_global_state_stays():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    filters = list(warnings.filters)
    with pytest.raises(InvalidInput):
        load_image(png_header(10_000, 10_000))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    assert warnings.filters == filters


def test_loading_in_threads_leaves_the_warning_filters_alone():
    content = encoded(Image.fromarray(NOISE), "PNG")
    filters = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(content) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == filters


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TGA", "TIFF", "WEBP"])
def test_damaged_files_give_an_image_or_one_clear_error(kind):
    image = Image.fromarray(NOISE)
    content = encoded(image.convert("P") if kind == "GIF" else image, kind)
    random = np.random.default_rng(3)
    for trial in range(100):
        damaged = bytearray(content)
        if trial % 2:
            damaged = damaged[: random.integers(len(content))]
        else:
            for place in random.integers(0, min(len(content), 400), 5):
                damaged[place] = random.integers(256)
        try:
            loaded = load_image(bytes(damaged))
        except InvalidInput as error:
            assert str(error).startswith("image (bytes)")
        else:
            assert loaded.ndim == 3
