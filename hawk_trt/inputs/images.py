"""Images as users bring them: a path, bytes, a PIL image or an array in; uint8 RGB [height, width, 3] out.

Sizes are read from the header and refused before anything is decoded, so that a hostile or mistaken file
costs neither memory nor time. Nothing of Pillow's global state is changed.
"""

import base64
import binascii
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from hawk_trt.errors import InvalidInput

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput

# Pillow's own bound against decompression bombs: a quarter gigabyte of RGB.
MAX_PIXELS = 89_478_485
# The formats that are opened. Pillow reads more, and some of them (EPS) by starting other programs.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# A baseline JPEG of so many times the bound is still opened: its decoder shrinks by 2, 4 or 8 on the way.
_SHRUNK_JPEG = 4
# A progressive JPEG holds all its coefficients at once, and every scan goes over all of them.
_SHRUNK_PROGRESSIVE = 2
_MAX_SCANNED_PIXELS = 2_000_000_000
_MAX_PNG_CHUNKS = 100_000
_BMP_HEADERS = 65_536
_REFUSED_MODES = {
    "F": "got floating point pixels, whose range is unknown. Convert it to 8 bits",
    "La": "got grey that is premultiplied with its transparency. Convert it to LA",
    "LAB": "got the colours of another space (LAB), expected RGB. Convert it with Pillow's ImageCms",
}

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TRANSPOSE_OF_ORIENTATION = {number: Image.Transpose[name] for number, name in enumerate(_TRANSPOSES.split(), 2)}
# What Pillow's decoders were seen to raise on files with bytes changed or cut off, warnings where they are errors.
_DAMAGED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, Warning, struct.error, zlib.error),
)
# How base64 of JPEG, PNG, GIF, WebP, BMP, TIFF and of AVIF and JPEG 2000 begins.
BASE64_STARTS = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
# What is often taken for an image that can be read, by its first bytes.
_OTHERS = {
    "HEIC": rb".{4}ftyp(he|mif1|msf1)",
    "a video": rb".{4}ftyp(?!avi)|\x1aE\xdf\xa3",
    "a PDF": rb"%PDF",
    "SVG or a web page": rb"\s*<",
}
_SCAN = b"\xff\xda"
_PNG = b"\x89PNG\r\n\x1a\n"


def load_image(source: "ImageInput", *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode an image, upright and in RGB: uint8 [height, width, 3], possibly read-only.

    EXIF orientation is applied, and transparency is composited on white (as the Qwen processors do). Every other
    mode becomes RGB as Pillow converts it, or is refused where Pillow would clip it.

    Args:
        source: a path (also file://, a data: URL or base64), the bytes of a file, a PIL image, or uint8
            [height, width], [height, width, 1], [.., 3] (RGB) or [.., 4] (RGBA).
        max_pixels: a larger file is shrunk to it by a whole number, a JPEG while it is decoded. What is not a JPEG
            and has more than MAX_PIXELS is refused, as are PIL images and arrays of more than max_pixels.

    Raises:
        InvalidInput: missing, unreadable, not an image, damaged, empty or too large; it names the source.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        check_size(source.width, source.height, "image (PIL)", max_pixels)
        with decoding("image (PIL)"):
            return _upright(to_rgb(source, "image (PIL)"), source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "image (bytes)", max_pixels)
    if isinstance(source, str) and source.lstrip()[:5].lower() == "data:":
        return _from_file(io.BytesIO(data_url_bytes(source.lstrip())), "image (data URL)", max_pixels)
    if isinstance(source, str) and source.lstrip().startswith(BASE64_STARTS) and not (_exists(source) or "." in source):
        return _from_file(io.BytesIO(base64_bytes(source)), "image (base64)", max_pixels)
    path = local_path(source, "image")
    with path.open("rb") as file:
        return _from_file(file, str(path), max_pixels)


def resize(image: npt.NDArray[np.uint8], height: int, width: int, resample: int) -> npt.NDArray[np.uint8]:
    """Resize an RGB image, its width first, then its height; resample is a filter, by Pillow's number.

    Two explicit passes, since Pillow 13 chooses their order by size, and each pass rounds to 8 bits: the
    other order is up to 23 levels away from what checkpoints were trained with.
    """
    kernel = Image.Resampling(resample)
    wide = Image.fromarray(image).resize((width, image.shape[0]), kernel)
    return np.asarray(wide.resize((width, height), kernel))


def local_path(source: "str | os.PathLike[str]", what: str) -> Path:
    """The existing file that a path or file:// URL names; InvalidInput where nothing readable is there."""
    if not isinstance(source, str | os.PathLike):
        raise InvalidInput(f"{what}: got {type(source).__name__}, expected a path, bytes, a PIL image or a uint8 array")
    name = os.fspath(source)
    if not name:
        raise InvalidInput(f"{what}: got an empty path. Give the path of one {what} file")
    if name[:5].lower() == "data:":  # of an image it has been read by now
        raise InvalidInput(f"{what}: got {name[:40]!r}, a data URL. Write it to a file and give its path")
    name = re.sub(
        r"^file:(?=/[^/])", "file://", name, flags=re.IGNORECASE
    )  # with one slash, as the standard has it too
    if "://" in name and not name.lower().startswith("file://"):
        raise InvalidInput(f"{name[:200]}: URLs are not downloaded. Download the {what} and give its path")
    try:
        path = _path_of_url(name) if name.lower().startswith("file://") else Path(name)
        if name.startswith("~/") and not path.exists():  # as in --image=~/photo.jpg, which a shell leaves as it is
            path = Path(name).expanduser()
        if not path.exists():
            raise InvalidInput(f"{path}: no such file. Check the path of the {what}")
        if not path.is_file():
            raise InvalidInput(f"{path}: not a file. Give the path of one {what} file")
        with path.open("rb") as file:
            if not file.read(1):
                raise InvalidInput(f"{path}: the file is empty. Get the {what} again")
    except OSError as error:
        raise InvalidInput(f"{name[:200]}: cannot be read ({error.strerror}). Check the path of the {what}") from error
    return path


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image or video frame that is empty or too large to decode."""
    if width < 1 or height < 1:
        raise InvalidInput(f"{name}: got {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise InvalidInput(
            f"{name}: got {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,}. "
            "Scale it down first"
        )


def data_url_bytes(url: str, kind: str = "image") -> bytes:
    """What a data: URL of an image or video holds; InvalidInput where it is not base64."""
    header, _, payload = url.partition(",")
    if not header.lower().replace(" ", "").endswith(";base64"):
        raise InvalidInput(f"{kind}: got {header[:60]!r}, expected data:{kind}/...;base64,...")
    return base64_bytes(unquote(payload), f"{kind} (data URL)")


def base64_bytes(text: str, name: str = "image (base64)") -> bytes:
    """Decode base64, with or without padding and line breaks, of the usual or the URL-safe alphabet."""
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"{name}: not valid base64 ({error})") from error


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises into InvalidInput."""
    try:
        yield
    except InvalidInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(f"{name}: more than {MAX_PIXELS:,} pixels. Scale it down first") from error
    except UnidentifiedImageError as error:
        raise InvalidInput(
            f"{name}: {error}not an image in a format that is read here. Convert it to PNG or JPEG"
        ) from error
    except MemoryError as error:
        raise InvalidInput(f"{name}: decoding it takes more memory than there is. Scale it down first") from error
    except _DAMAGED as error:
        raise InvalidInput(
            f"{name}: truncated or damaged ({error or type(error).__name__}). Get the file again"
        ) from error


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    if max_pixels < 1:
        raise InvalidInput(f"{name}: the other images use the whole limit of pixels. Send fewer images")
    with decoding(name), open_image(file, FORMATS) as image:
        _check_work(image, file, name)
        if isinstance(image, JpegImagePlugin.JpegImageFile) and image.width * image.height > max_pixels:
            shrink = math.sqrt(image.width * image.height / max_pixels)
            step = next((step for step in (2, 4, 8) if step >= shrink), 8)
            image.draft(None, (max(image.width // step, 1), max(image.height // step, 1)))
        rgb = to_rgb(image, name)
        factor = math.ceil(math.sqrt(rgb.width * rgb.height / max_pixels))
        return _upright(rgb.reduce(factor) if factor > 1 else rgb, image)


def open_image(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """Open a file without decoding it; of the formats only JPEG may be larger than Pillow lets pass."""
    content = file.read() if file.read(8) == _PNG else b""
    file.seek(0)
    if _png_chunks(content) > _MAX_PNG_CHUNKS:  # Pillow reads them one by one before it knows the size
        raise ValueError("it holds far more chunks than a picture needs")
    Image.preinit()  # registers the usual formats
    try:
        try:
            return Image.open(file, formats=[name for name in formats if name in Image.OPEN])
        except UnidentifiedImageError:
            Image.init()  # registers the rarer formats
            return Image.open(file, formats=[name for name in formats if name in Image.OPEN])
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(64)
        kind = next((kind for kind, start in _OTHERS.items() if re.match(start, head, re.DOTALL)), None)
        raise UnidentifiedImageError(f"{kind}, " if kind else "") from error
    except Image.DecompressionBombError:
        file.seek(0)
        if "JPEG" not in formats or file.read(3) != b"\xff\xd8\xff":
            raise
        file.seek(0)
        return JpegImagePlugin.JpegImageFile(file)


def _png_chunks(content: bytes) -> int:
    """Chunks of a PNG behind its signature, counted no further than is allowed."""
    at, count = 0, 0
    while at + 8 <= len(content) and count <= _MAX_PNG_CHUNKS:
        at, count = at + 12 + int.from_bytes(content[at : at + 4], "big"), count + 1
    return count


def _check_work(image: Image.Image, file: IO[bytes], name: str) -> None:
    """Refuse files whose decoding would take memory or time out of all proportion to their picture."""
    pixels, jpeg = image.width * image.height, image.format in ("JPEG", "MPO")
    progressive = jpeg and bool(image.info.get("progressive"))
    shrunk = _SHRUNK_PROGRESSIVE if progressive else _SHRUNK_JPEG
    check_size(image.width, image.height, name, MAX_PIXELS * (shrunk if jpeg else 1))
    run_length = isinstance(image, ImageFile.ImageFile) and [tile[0] for tile in image.tile] == ["bmp_rle"]
    if not (progressive or run_length):
        return
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    scanned = progressive and pixels * content.count(_SCAN) > _MAX_SCANNED_PIXELS
    if scanned or (run_length and len(content) > 2 * pixels + _BMP_HEADERS):
        raise InvalidInput(f"{name}: holds far more data than its {pixels:,} pixels need. Save it again as PNG or JPEG")


def _upright(rgb: Image.Image, image: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of an image, turned as its EXIF data ask; a decoder that turns by itself has removed them by now."""
    try:
        turn = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DAMAGED:  # damaged metadata do not make the pixels unusable
        turn = None
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode as RGB: transparency on white, all else as Pillow converts it where that loses nothing."""
    mode = image.mode
    if mode in _REFUSED_MODES:
        raise InvalidInput(f"{name}: {_REFUSED_MODES[mode]}")
    if mode.startswith("I"):
        levels, transparent = np.asarray(image), image.info.get("transparency")
        low, high = levels.min(), levels.max()
        if low < 0 or high > 255:
            raise InvalidInput(
                f"{name}: got grey levels from {low} to {high}, expected 0 to 255: how bright {high} is, the file does "
                "not say. Scale them to 0 to 255 and save 8 bits"
            )
        image = Image.fromarray(levels.astype(np.uint8))
        if transparent in range(256):
            image.info["transparency"] = transparent
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> npt.NDArray[np.uint8]:
    got = f"image (array): got {array.dtype}{list(array.shape)}"
    if array.dtype != np.uint8:
        raise InvalidInput(f"{got}, expected uint8. Scale the values to 0..255 and cast them")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise InvalidInput(f"{got}, expected uint8[height, width], [.., 1], [.., 3] (RGB) or [.., 4] (RGBA)")
    check_size(array.shape[1], array.shape[0], "image (array)", max_pixels)
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(array)), "image (array)"))


def _path_of_url(url: str) -> Path:
    """The path of a file:// URL, whose name may hold "#", "?" and "%" escaped or as they are."""
    rest = url[len("file://") :]
    names = (unquote(rest), rest, unquote(rest.removeprefix("localhost")))
    host = rest.partition("/")[0]
    if host not in ("", "localhost") and not any(map(_exists, names)):
        raise InvalidInput(f"{url[:200]}: no such file. Write file:/// and the whole path")
    return Path(next(filter(_exists, names), names[-1]))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL: no name of a file
        return False
