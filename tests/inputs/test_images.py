"""Images as users bring them: formats, modes, orientation, and what cannot be one."""

import base64
import io
import urllib.parse
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import load_image
from pictures import NOISE, encoded, picture


def their_rgb(image):
    """What transformers' processor makes of a PIL image before resizing."""
    return Qwen2VLImageProcessorPil().process_image(image, do_convert_rgb=True).transpose(1, 2, 0)


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
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match=r"damaged \(Corrupt EXIF data"):
        warnings.simplefilter("error")
        load_image(content)


def test_a_warning_of_too_many_pixels_is_a_clear_error_where_warnings_are_errors():
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match=r"more than .* pixels\. Scale it down"):
        warnings.simplefilter("error")
        load_image(encoded(Image.new("1", (12_000, 8_000)), "PNG"))


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


def test_avif_opens():
    content = encoded(Image.fromarray(NOISE), "AVIF")
    with Image.open(io.BytesIO(content)) as plain:
        np.testing.assert_array_equal(load_image(content), np.asarray(plain.convert("RGB")))
    np.testing.assert_array_equal(load_image(base64.b64encode(content).decode()), load_image(content))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_grey_of_more_bits_becomes_white_where_it_is_transparent(dtype):
    image = Image.fromarray(NOISE[..., 0].astype(dtype))
    image.info["transparency"] = int(NOISE[0, 0, 0])
    expected = np.where(NOISE[..., :1] == NOISE[0, 0, 0], 255, NOISE[..., :1])
    np.testing.assert_array_equal(load_image(image), np.repeat(expected, 3, axis=2))


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
        "data:image/png; base64",
    ):
        np.testing.assert_array_equal(load_image(f"{kind},{text}"), load_image(picture))
    if spelling != "escaped":
        np.testing.assert_array_equal(load_image(text), load_image(picture))


@pytest.mark.parametrize("name", ["a#b.png", "a?b.png", "a%20b.png", "100%.png", "ä b.png", "a%b#c?d.png"])
def test_a_file_url_finds_every_name_escaped_or_not(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(NOISE).save(path)
    for url in (
        path.as_uri(),
        f"file://{path}",
        f"FILE://{path}",
        f"file:{path}",
        path.as_uri().replace("file://", "file://localhost"),
    ):
        np.testing.assert_array_equal(load_image(url), NOISE)


def test_a_path_in_the_home_folder_and_a_data_url_after_a_space(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    expected = load_image(tmp_path / "a.png")
    url = " data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for source in ("~/a.png", url):
        np.testing.assert_array_equal(load_image(source), expected)
