"""Images as users bring them: a path, bytes, a PIL image or an array in; uint8 RGB [height, width, 3] out.

Sizes are read from the header and refused before anything is decoded, so that a hostile or mistaken file
costs neither memory nor time. Nothing of Pillow's global state is changed.
"""

import base64
import binascii
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from hawk_trt.errors import InvalidInput

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput

# Pillow's own bound against decompression bombs: a quarter gigabyte of RGB.
MAX_PIXELS = 89_478_485

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders were seen to raise on files with bytes changed or cut off.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_DECODING = threading.Lock()


def load_image(
    source: "ImageInput", *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode an image, upright and in RGB.

    EXIF orientation is applied, transparency is composited on white (as the Qwen processors do), 16-bit grey is
    scaled to 8 bit.

    Args:
        source: a path (also file:// or a data: URL), the bytes of a file, a PIL image, or uint8 [height, width],
            [height, width, 1], [.., 3] (RGB) or [.., 4] (RGBA).
        max_pixels: the most that are decoded.
        formats: of files, by Pillow's names; None is all that Pillow reads.

    Returns:
        uint8 [height, width, 3], possibly read-only.

    Raises:
        InvalidInput: missing, unreadable, not an image, damaged, empty or too large; it names the source.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        with _decoding("image (PIL)"):
            return _decode(source, "image (PIL)", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "image (bytes)", max_pixels, formats)
    if isinstance(source, str) and source.startswith("data:"):
        return _from_file(io.BytesIO(data_url_bytes(source)), "image (data URL)", max_pixels, formats)
    path = local_path(source, "image")
    with path.open("rb") as file:
        return _from_file(file, str(path), max_pixels, formats)


def resize(image: npt.NDArray[np.uint8], height: int, width: int, resample: int) -> npt.NDArray[np.uint8]:
    """Resize an RGB image, its width first, then its height.

    Two explicit passes, since Pillow 13 chooses their order by size, and each pass rounds to 8 bits: the
    other order is up to 23 levels away from what checkpoints were trained with.

    Args:
        image: uint8 [height, width, 3].
        height: wanted, in pixels.
        width: wanted, in pixels.
        resample: a filter, by Pillow's number.
    """
    kernel = Image.Resampling(resample)
    wide = Image.fromarray(image).resize((width, image.shape[0]), kernel)
    return np.asarray(wide.resize((width, height), kernel))


def local_path(source: "str | os.PathLike[str]", what: str) -> Path:
    """The existing file that a path or file:// URL names.

    Raises:
        InvalidInput: no path at all, a URL elsewhere, or nothing readable there.
    """
    if not isinstance(source, str | os.PathLike):
        raise InvalidInput(f"{what}: got {type(source).__name__}, expected a path, bytes, a PIL image or a uint8 array")
    name = os.fspath(source)
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    elif "://" in name:
        raise InvalidInput(f"{name}: addresses are not fetched. Download the {what} and give its path")
    path = Path(name)
    try:
        there, regular = path.exists(), path.is_file()
        content = b""
        if regular:
            with path.open("rb") as file:
                content = file.read(1)
    except OSError as error:
        raise InvalidInput(f"{name[:200]}: cannot be read ({error.strerror}). Check the path of the {what}") from error
    if not there:
        raise InvalidInput(f"{path}: no such file. Check the path of the {what}")
    if not regular:
        raise InvalidInput(f"{path}: not a file. Give the path of one {what} file")
    if not content:
        raise InvalidInput(f"{path}: the file is empty. Get the {what} again")
    return path


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image or video frame that is empty or too large to decode.

    Raises:
        InvalidInput: a side of zero pixels, or more than max_pixels in all.
    """
    if width < 1 or height < 1:
        raise InvalidInput(f"{name}: got {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise InvalidInput(
            f"{name}: got {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,}. "
            "Scale it down first"
        )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises into InvalidInput, and drop its warnings of sizes and odd metadata.

    warnings.catch_warnings swaps the filters of the whole process, so two threads must not interleave in it.
    """
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except InvalidInput:
            raise
        except Image.DecompressionBombError as error:
            raise InvalidInput(f"{name}: more than {MAX_PIXELS:,} pixels. Scale it down first") from error
        except UnidentifiedImageError as error:
            raise InvalidInput(f"{name}: not an image that Pillow can read. Convert it to PNG or JPEG") from error
        except _DAMAGED as error:
            raise InvalidInput(
                f"{name}: truncated or damaged ({error or type(error).__name__}). Get the file again"
            ) from error


def _from_file(file: IO[bytes], name: str, max_pixels: int, formats: tuple[str, ...] | None) -> npt.NDArray[np.uint8]:
    with _decoding(name), Image.open(file, formats=formats) as image:
        return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    check_size(image.width, image.height, name, max_pixels)
    rgb = _to_rgb(image, name)
    turn = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, None where there is none or it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGED:  # damaged metadata do not make the pixels unusable
        return None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image, name)
    if image.mode == "F":
        raise InvalidInput(f"{name}: got floating point pixels, whose range is unknown. Convert it to 8 bits")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey, which Pillow holds as I;16 or I, and which its own convert would clip to white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise InvalidInput(f"{name}: got 32-bit pixels, whose range is unknown. Convert it to 8 or 16 bits")
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


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
    return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), "image (array)"))


def data_url_bytes(url: str) -> bytes:
    """What a data: URL of an image holds.

    Raises:
        InvalidInput: it is not base64.
    """
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise InvalidInput(f"image: got {header[:60]!r}, expected data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise InvalidInput(f"image (data URL): not valid base64 ({error})") from error
