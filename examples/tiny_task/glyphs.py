"""What can stand in a scene: eighteen glyphs, as bitmaps, and eight colours.

Eight shapes of 7 x 7 and ten digits of 7 x 5 points; a point is drawn as 3 x 3 pixels, so that every glyph
fits a cell of 28 pixels, the side of one visual token.
"""

import numpy as np
import numpy.typing as npt

PIXELS_PER_POINT = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 230),
    "yellow": (235, 225, 50),
    "purple": (150, 50, 200),
    "orange": (245, 140, 30),
    "cyan": (60, 220, 225),
    "white": (245, 245, 245),
}

_DIGITS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}

_SHAPES = {
    "circle": "0011100 0111110 1111111 1111111 1111111 0111110 0011100",
    "square": "1111111 1111111 1111111 1111111 1111111 1111111 1111111",
    "triangle": "0001000 0001000 0011100 0011100 0111110 0111110 1111111",
    "ring": "0011100 0110110 1100011 1000001 1100011 0110110 0011100",
    "cross": "0011100 0011100 1111111 1111111 1111111 0011100 0011100",
    "heart": "0110110 1111111 1111111 1111111 0111110 0011100 0001000",
    "frame": "1111111 1100011 1000001 1000001 1000001 1100011 1111111",
    "arrow": "0001000 0011100 0111110 1111111 0001000 0001000 0001000",
}

DIGITS = tuple(_DIGITS)
SHAPES = tuple(_SHAPES)
GLYPHS = DIGITS + SHAPES


def enlarge(points: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Draw each point [height, width] as a square of PIXELS_PER_POINT pixels."""
    return points.repeat(PIXELS_PER_POINT, axis=0).repeat(PIXELS_PER_POINT, axis=1)


def _bitmap(rows: str) -> npt.NDArray[np.bool_]:
    return enlarge(np.array([[point == "1" for point in row] for row in rows.split()]))


BITMAPS = {glyph: _bitmap(rows) for glyph, rows in (_DIGITS | _SHAPES).items()}
"""bool [21, 15 (digits) or 21 (shapes)] by glyph."""
