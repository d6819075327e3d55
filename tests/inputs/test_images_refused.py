"""What is no image, or too large to decode, is refused; damaged files never end in more than one clear error."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import MAX_PIXELS, load_image
from pictures import NOISE, encoded, png_header

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
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ("HEIC, not an image", "PNG or JPEG")),
        (b"\0\0\0\x18ftypisom\0\0\2\0", ("a video, not an image",)),
        (b"%PDF-1.7\n", ("a PDF, not an image",)),
        (png_header(10_000, 10_000), ("image (bytes)", "10000 x 10000")),
        (Image.new("RGB", (0, 5)), ("image (PIL)", "0 x 5", "at least 1 x 1")),
        (Image.new("F", (4, 4)), ("image (PIL)", "floating point")),
        (np.zeros((0, 4, 3), np.uint8), ("image (array)", "4 x 0")),
        (np.zeros((4, 4, 2), np.uint8), ("uint8[4, 4, 2]", "RGBA")),
        (np.zeros((2, 4, 4, 3), np.uint8), ("uint8[2, 4, 4, 3]",)),
        (np.zeros((4, 4, 3), np.float32), ("float32[4, 4, 3]", "uint8", "0..255")),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), ("10000 x 10000", "89,478,485")),
        ("https://host/a.png", ("https://host/a.png", "not downloaded")),
        ("data:image/png;base64,%%%", ("data URL", "base64")),
        ("data:image/png,abc", ("data:image/png", "base64")),
        ("a\0b.png", ("no such file",)),
        ("", ("an empty path",)),
        ("Qk/none.png", ("Qk/none.png", "no such file")),  # begins as base64 of a BMP does
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
    photo = Image.radial_gradient("L").resize((8160, 6120)).convert("RGB")
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
    start = time.process_time()  # which a busy machine does not stretch
    with pytest.raises(InvalidInput, match=r"far more (data|chunks) than"):
        load_image(bomb)
    assert time.process_time() - start < 5


def test_the_bound_is_pillows_own_and_its_global_state_stays():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    with pytest.raises(InvalidInput):
        load_image(png_header(10_000, 10_000))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


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
