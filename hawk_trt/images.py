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
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from hawk_trt.errors import InvalidInput

if TYPE_CHECKING:
    from hawk_trt.requests import ImageInput

# Pillow's own bound against decompression bombs: a quarter gigabyte of RGB.
MAX_PIXELS = 89_478_485

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
# warnings.catch_warnings swaps the filters of the whole process: two threads in it must not interleave.
_HEADER_LOCK = threading.Lock()


def load_image(source: "ImageInput") -> npt.NDArray[np.uint8]:
    """Decode an image, upright and in RGB.

    EXIF orientation is applied, transparency is composited on white (as the Qwen processors do), 16-bit grey is
    scaled to 8 bit.

    Args:
        source: a path (also file:// or a data: URL), the bytes of a file, a PIL image, or uint8 [height, width],
            [height, width, 1], [.., 3] (RGB) or [.., 4] (RGBA).

    Returns:
        uint8 [height, width, 3], possibly read-only.

    Raises:
        InvalidInput: missing, unreadable, not an image, damaged, empty or too large; it names the source.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "image (PIL)")
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), "image (bytes)")
    if isinstance(source, str) and source.startswith("data:"):
        return _from_bytes(_data_url_bytes(source), "image (data URL)")
    path = local_path(source, "image")
    return _from_bytes(path.read_bytes(), str(path))


def resize(image: npt.NDArray[np.uint8], height: int, width: int, resample: int) -> npt.NDArray[np.uint8]:
    """Resize an RGB image, its width first, then its height.

    Two explicit passes, since Pillow 13 chooses their order by size, and each pass rounds to 8 bits: up to
    20 levels away from what checkpoints were trained with.

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
        if not path.exists():
            raise InvalidInput(f"{path}: no such file. Check the path of the {what}")
        if not path.is_file():
            raise InvalidInput(f"{path}: not a file. Give the path of one {what} file")
        if path.stat().st_size == 0:
            raise InvalidInput(f"{path}: the file is empty. Check the {what}")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{name!r}: cannot be read ({error})") from error
    return path


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image or video frame that is empty or too large to decode.

    Raises:
        InvalidInput: a side of zero pixels, or more than MAX_PIXELS in all.
    """
    if width < 1 or height < 1:
        raise InvalidInput(f"{name}: got {width} x {height} pixels, expected at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise InvalidInput(
            f"{name}: got {width} x {height} = {width * height:,} pixels, expected at most {MAX_PIXELS:,}. "
            "Scale it down first"
        )


def _from_bytes(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bomb and metadata warnings: sizes are checked below
        try:
            image = Image.open(io.BytesIO(content))
        except Image.DecompressionBombError as error:
            raise InvalidInput(f"{name}: more than {MAX_PIXELS:,} pixels. Scale it down first") from error
        except UnidentifiedImageError as error:
            raise InvalidInput(f"{name}: not an image that Pillow can read. Convert it to PNG or JPEG") from error
        except _DAMAGED as error:
            raise _damaged(name, error) from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    check_size(image.width, image.height, name)
    orientation = _orientation(image)
    try:
        rgb = _to_rgb(image, name)
        if orientation in _TRANSPOSE_OF_ORIENTATION:
            rgb = rgb.transpose(_TRANSPOSE_OF_ORIENTATION[orientation])
        return np.asarray(rgb)
    except InvalidInput:
        raise
    except _DAMAGED as error:
        raise _damaged(name, error) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = image.getexif().get(_ORIENTATION_TAG)
        except _DAMAGED:  # damaged metadata do not make the pixels unusable
            return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image, name)
    if image.mode == "F":
        raise InvalidInput(f"{name}: got floating point pixels, whose range is unknown. Convert it to 8 bits")
    # getbands and info hold before decoding; a palette's transparency is in info.
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


def _from_array(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    got = f"image (array): got {array.dtype}{list(array.shape)}"
    if array.dtype != np.uint8:
        raise InvalidInput(f"{got}, expected uint8. Scale the values to 0..255 and cast them")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise InvalidInput(f"{got}, expected uint8[height, width], [.., 1], [.., 3] (RGB) or [.., 4] (RGBA)")
    check_size(array.shape[1], array.shape[0], "image (array)")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), "image (array)"))


def _data_url_bytes(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise InvalidInput(f"image: got {header[:60]!r}, expected data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise InvalidInput(f"image (data URL): not valid base64 ({error})") from error


def _damaged(name: str, error: BaseException) -> InvalidInput:
    return InvalidInput(f"{name}: truncated or damaged ({error or type(error).__name__}). Get the file again")
