"""One scene: a noisy background, coloured glyphs, and grey junk that no question asks about.

In goes a random generator and the sizes, out come the picture and what stands where in it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .glyphs import BITMAPS, COLOURS, GLYPHS, SHAPES, enlarge

CELL = 28  # pixels: the side of one visual token, 2 x 2 patches of 14
_STRADDLE = 9  # pixels that a glyph is moved by at most where scenes are not aligned
_MAX_THINGS = 64  # beyond it hardly any thing is the only one of its kind, which most questions need
_MAX_SAME = 5  # glyphs of one shape that a scene may hold on purpose, for counting


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the picture, in pixels from its top left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle, as x and y in pixels."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Thing:
    """One glyph of a scene."""

    glyph: str
    colour: str
    box: Box

    @property
    def is_digit(self) -> bool:
        """Whether it is a digit, and not a shape."""
        return self.glyph.isdigit()


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, uint8 [size, size, 3] RGB, and the things in it (without the junk)."""

    image: npt.NDArray[np.uint8]
    things: tuple[Thing, ...]

    @property
    def size(self) -> int:
        """Height and width of the picture in pixels."""
        return int(self.image.shape[0])


def max_things(size: int) -> int:
    """How many things a scene of this size can hold: each needs a cell, and so does the junk."""
    cells = (size // CELL) ** 2
    return min(cells - _junk_limit(cells) + 1, _MAX_THINGS)


def draw_scene(rng: np.random.Generator, size: int, num_things: int, *, aligned: bool) -> Scene:
    """Draw a scene of num_things glyphs, each in a cell of its own.

    Args:
        rng: decides everything.
        size: height and width in pixels, a multiple of CELL.
        num_things: at most max_things(size).
        aligned: glyphs stay inside their cell, so that one visual token sees a whole one; else they are
            moved by up to 9 pixels and may straddle, or even cover, others.
    """
    canvas = _background(rng, size)
    grid = size // CELL
    cells = rng.permutation(grid * grid)
    num_junk = int(rng.integers(0, _junk_limit(grid * grid)))

    things = []
    names = zip(_choose_glyphs(rng, num_things), _choose_colours(rng, num_things), strict=True)
    for cell, (glyph, colour) in zip(cells[:num_things], names, strict=True):
        bitmap = BITMAPS[glyph]
        box = _place(rng, int(cell), bitmap, size, aligned=aligned)
        _paint(rng, canvas, box, bitmap, np.array(COLOURS[colour]) + rng.normal(0, 9, 3))
        things.append(Thing(glyph, colour, box))
    for cell in cells[num_things : num_things + num_junk]:
        bitmap = enlarge(rng.random((7, 6)) < 0.45)
        box = _place(rng, int(cell), bitmap, size, aligned=aligned)
        _paint(rng, canvas, box, bitmap, rng.uniform(20, 230) + rng.normal(0, 5, 3))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(things))


def _junk_limit(cells: int) -> int:
    """One more than the most pieces of junk in a scene of so many cells."""
    return max(2, cells // 8)


def _background(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """A soft gradient through 5 x 5 random colours, with grey noise: float64 [size, size, 3]."""
    colours = rng.uniform(60, 150) + rng.normal(0, 22, (5, 5, 3))
    at = np.linspace(0, 4, size)
    left = np.minimum(at.astype(int), 3)
    blend = (at - left)[:, None]
    rows = colours[left] * (1 - blend)[..., None] + colours[left + 1] * blend[..., None]
    soft = rows[:, left] * (1 - blend) + rows[:, left + 1] * blend
    noisy: npt.NDArray[np.float64] = soft + 8 * rng.standard_normal((size, size, 1))
    return noisy


def _choose_glyphs(rng: np.random.Generator, count: int) -> list[str]:
    """All different, but that often a first few are one shape several times, for counting."""
    chosen: list[str] = []
    if count >= 3 and rng.random() < (0.5 if count <= 10 else 0.8):
        same = int(rng.integers(2, min(_MAX_SAME, count) + 1))
        chosen = [SHAPES[rng.integers(len(SHAPES))]] * same
    others = [glyph for glyph in rng.permutation(GLYPHS).tolist() if glyph not in chosen]
    chosen += others[: count - len(chosen)]
    chosen += [GLYPHS[i] for i in rng.integers(len(GLYPHS), size=count - len(chosen))]
    return chosen


def _choose_colours(rng: np.random.Generator, count: int) -> list[str]:
    """Every colour once before any repeats."""
    names = tuple(COLOURS)
    chosen: list[str] = rng.permutation(names).tolist()[:count]
    return chosen + [names[i] for i in rng.integers(len(names), size=count - len(chosen))]


def _place(rng: np.random.Generator, cell: int, bitmap: npt.NDArray[np.bool_], size: int, *, aligned: bool) -> Box:
    """Somewhere in the cell, or near it."""
    height, width = bitmap.shape
    row, column = divmod(cell, size // CELL)
    y = row * CELL + int(rng.integers(CELL - height + 1))
    x = column * CELL + int(rng.integers(CELL - width + 1))
    if not aligned:
        y = min(max(y + int(rng.integers(-_STRADDLE, _STRADDLE + 1)), 0), size - height)
        x = min(max(x + int(rng.integers(-_STRADDLE, _STRADDLE + 1)), 0), size - width)
    return Box(x, y, width, height)


def _paint(
    rng: np.random.Generator,
    canvas: npt.NDArray[np.float64],
    box: Box,
    bitmap: npt.NDArray[np.bool_],
    rgb: npt.NDArray[np.float64],
) -> None:
    """Set the bitmap's pixels of canvas to a colour with grey noise."""
    region = canvas[box.y : box.y + box.height, box.x : box.x + box.width]
    region[bitmap] = rgb + rng.normal(0, 8, (int(bitmap.sum()), 1))
