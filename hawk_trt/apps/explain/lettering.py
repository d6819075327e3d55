"""Text in a picture: fonts by size, line heights, and wrapping by measured width."""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

# Tried by name when a text goes beyond Latin, which is all that Pillow's own font has.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "wqy-microhei.ttc",
    "DejaVuSans.ttf",
)


@dataclass(frozen=True, slots=True)
class Lettering:
    """A font and the height of its lines in pixels."""

    font: Font
    line_px: int

    @classmethod
    def of_size(cls, size_px: int, sample: str = "") -> "Lettering":
        """Pillow's own font, or one of the system's where the sample goes beyond Latin."""
        font: Font = ImageFont.load_default(size_px)
        for name in () if all(ord(one) < 0x250 or 0x2000 <= ord(one) < 0x2100 for one in sample) else _WIDE_FONTS:
            with suppress(OSError):  # not on this machine
                font = ImageFont.truetype(name, size_px)
                break
        return cls(font, round(font.getbbox("Ag|")[3] * 1.3))

    def width_px(self, text: str) -> int:
        """Width of a text on one line."""
        return round(self.font.getlength(text))

    def wrap(self, text: str, width_px: int, max_lines: int) -> list[str]:
        """Break a text into lines, at spaces where it has them; the last one ends in '...' if more was to come."""
        lines: list[str] = []
        for paragraph in text.strip().splitlines():
            line = ""
            for word in paragraph.split():
                joined = f"{line} {word}" if line else word
                if self.width_px(joined) <= width_px:
                    line = joined
                    continue
                if line:
                    lines.append(line)
                line = word
                while self.width_px(line) > width_px and len(line) > 1:  # a long word, or a script without spaces
                    fits = max(bisect_right(range(len(line)), width_px, key=lambda n: self.width_px(line[:n])) - 1, 1)
                    lines.append(line[:fits])
                    line = line[fits:]
            lines.append(line)
            if len(lines) > max_lines:
                break
        if len(lines) > max_lines:
            lines = lines[:max_lines]
            while lines[-1] and self.width_px(lines[-1] + "...") > width_px:
                lines[-1] = lines[-1][:-1]
            lines[-1] += "..."
        return lines

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], colour: Colour) -> int:
        """Draw lines from their upper left corner on; returns the y below them."""
        x, y = place
        for line in lines:
            draw.text((x, y), line, colour, self.font)
            y += self.line_px
        return y
