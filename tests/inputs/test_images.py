"""Images as users bring them: formats, modes, orientation, and what cannot be one."""

import base64
import io
import struct
import threading
import time
import urllib.parse
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


DEEP_MODES = ["I", "I;16", "I;16L", "I;16B"]


def deep(mode, levels):
    """Grey levels as a picture of more than 8 bits."""
    if mode in ("I", "I;16"):
        return Image.fromarray(levels.astype(np.int32 if mode == "I" else np.uint16))
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, levels.shape[::-1], levels.astype(order).tobytes())


@pytest.mark.parametrize("mode", DEEP_MODES)
def test_grey_of_more_than_8_bits_that_holds_8_keeps_its_levels(mode):
    levels = np.arange(256).reshape(16, 16)
    image = deep(mode, levels)
    assert image.mode == mode
    expected = np.repeat(levels[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
    np.testing.assert_array_equal(load_image(image), expected)


@pytest.mark.parametrize("mode", DEEP_MODES)
@pytest.mark.parametrize("highest", [256, 4095, 65535])
def test_grey_beyond_8_bits_is_refused_since_pillow_would_clip_it(mode, highest):
    image = deep(mode, np.linspace(0, highest, 64).reshape(8, 8).astype(np.int64))
    with pytest.raises(InvalidInput, match=f"grey levels from 0 to {highest}, expected 0 to 255.*Scale them"):
        load_image(image)


@pytest.mark.parametrize("mode", ["F", "LAB", "La"])
def test_a_mode_without_one_meaning_is_refused_with_the_remedy(mode):
    with pytest.raises(InvalidInput, match="Convert it"):
        load_image(Image.new(mode, (4, 4)))


def test_every_mode_of_pillow_is_decided():
    for mode in (*Image.MODES, "I;16L", "I;16B", "RGBa", "La"):
        image = Image.new(mode, (4, 4))
        try:
            loaded = load_image(image)
        except InvalidInput as error:
            assert "Convert it" in str(error)
        else:
            straight = image.convert("RGBA") if mode == "RGBa" else image
            np.testing.assert_array_equal(loaded, their_rgb(straight))


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
    "deep": ("i.tif", "grey levels from 70000", "0 to 255"),
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


def test_a_large_photo_is_shrunk_while_it_is_decoded():
    photo = Image.effect_noise((8160, 6120), 40).convert("RGB")
    content = encoded(photo, "JPEG", quality=50)
    loaded = load_image(content, max_pixels=16_000_000)
    assert loaded.shape == (3060, 4080, 3)
    assert abs(loaded.mean() - np.asarray(photo).mean()) < 2
    assert load_image(content, max_pixels=300_000).shape == (383, 510, 3)  # by 8 in the decoder, by 2 after it
    assert load_image(encoded(photo.resize((2000, 1000)), "PNG"), max_pixels=500_000).shape == (500, 1000, 3)


def test_a_photo_beyond_pillows_own_limit_opens():
    content = encoded(Image.new("L", (16_320, 12_240), 90), "JPEG")
    loaded = load_image(content)
    assert loaded.shape == (6120, 8160, 3)
    assert (loaded == 90).all()


def test_an_image_of_a_format_that_starts_other_programs_is_not_opened():
    eps = encoded(Image.fromarray(NOISE), "EPS")
    with pytest.raises(InvalidInput, match="not an image in a format that is read here"):
        load_image(eps)


def test_avif_opens():
    content = encoded(Image.fromarray(NOISE), "AVIF")
    with Image.open(io.BytesIO(content)) as plain:
        np.testing.assert_array_equal(load_image(content), np.asarray(plain.convert("RGB")))


def progressive_with_scans(count):
    """A progressive JPEG of 2000 x 2000 whose last scan is repeated."""
    content = encoded(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    return content[: content.rindex(b"\xff\xd9")] + scan * count + b"\xff\xd9"


def chunky_png(count):
    content = encoded(Image.fromarray(NOISE), "PNG")
    empty = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    return content[:33] + empty * count + content[33:]


def run_length_bitmap(empty_lines):
    """An 8-bit BMP of 4 x 4 in run-length coding, whose data begin with so many empty lines."""
    data = b"\x00\x00" * empty_lines + b"\x04\x07\x00\x00" * 4 + b"\x00\x01"
    palette = bytes(4 * 256)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


@pytest.mark.parametrize(
    ("usual", "bomb"),
    [
        (progressive_with_scans(10), progressive_with_scans(2000)),
        (chunky_png(10), chunky_png(200_000)),
        (run_length_bitmap(0), run_length_bitmap(1_000_000)),
    ],
    ids=["scans", "chunks", "runs"],
)
def test_a_file_with_far_more_data_than_its_picture_needs_is_refused_at_once(usual, bomb):
    assert load_image(usual).ndim == 3
    start = time.monotonic()
    with pytest.raises(InvalidInput, match=r"far more (data|chunks) than"):
        load_image(bomb)
    assert time.monotonic() - start < 5


def spelled(content):
    plain = base64.b64encode(content).decode()
    return {
        "padded": plain,
        "unpadded": plain.rstrip("="),
        "wrapped": base64.encodebytes(content).decode(),
        "wrapped as mail does": plain.replace("A", "A\r\n"),
        "url-safe": base64.urlsafe_b64encode(content).decode(),
        "escaped": urllib.parse.quote(plain),
        "after a space": f" {plain}\n",
    }


@pytest.mark.parametrize("spelling", spelled(b""))
def test_base64_has_one_meaning_however_it_is_written(spelling):
    picture = next(
        image for size in range(20, 60) if len(image := encoded(Image.fromarray(NOISE[:, :size]), "JPEG")) % 3
    )
    text = spelled(picture)[spelling]
    for kind in (
        "data:image/jpeg;base64",
        "DATA:image/JPEG;BASE64",
        "data:;base64",
        "data:image/png;name=a;base64",
    ):
        np.testing.assert_array_equal(load_image(f"{kind},{text}"), load_image(picture))
    if spelling not in ("escaped", "after a space"):
        np.testing.assert_array_equal(load_image(text), load_image(picture))


@pytest.mark.parametrize("name", ["a#b.png", "a?b.png", "a%20b.png", "100%.png", "ä b.png", "a%b#c?d.png"])
def test_a_file_url_finds_every_name_escaped_or_not(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(NOISE).save(path)
    for url in (
        path.as_uri(),
        f"file://{path}",
        f"FILE://{path}",
        path.as_uri().replace("file://", "file://localhost"),
    ):
        np.testing.assert_array_equal(load_image(url), NOISE)


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
