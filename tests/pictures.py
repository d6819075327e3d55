"""Pictures as files of every format."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# Two photographs and a page of text: tests/data/pictures/README.md says whose.
NATURAL = sorted(path for path in (Path(__file__).parent / "data" / "pictures").iterdir() if path.suffix != ".md")
NOISE = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (31, 47), dtype=np.uint8)


def noise(height, width, seed=0):
    """Random pixels: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def png_header(width, height):
    """A PNG that states a size and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
