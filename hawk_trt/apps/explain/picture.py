"""The picture of an explanation: every image as given, its scores as a heat map, and what each keep ratio kept.

Columns are the original, the scores and the keep ratios, with the answers above; rows are the images and
the frames of the videos. Small images are scaled up and large ones down, so that text and tokens stay legible.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hawk_trt.apps.explain import Explanation, VisualItem
from hawk_trt.apps.explain.lettering import Lettering
from hawk_trt.apps.explain.panels import colours, heat_panel, kept_panel
from hawk_trt.errors import InvalidInput
from hawk_trt.files import write_atomically

MAX_FRAMES = 6  # of one video
_KEY = "Kept tokens in full colour, dropped tokens dimmed."

_PAPER = (255, 255, 255)
_INK = (31, 35, 40)
_MUTED = (101, 109, 118)
_RULE = (208, 215, 222)
_CELL_PX = 14  # wished for one token
_MIN_PANEL_PX, _MAX_PANEL_PX, _MAX_WIDTH_PX = 300, 720, 3600
_MAX_TEXT_LINES = 6


@dataclass(frozen=True, slots=True)
class _Row:
    """One image or frame: its label, its pixels, and its place in the explanation."""

    label: str
    image: Image.Image
    item: int
    step: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The measures of one picture, in pixels, and its type sizes."""

    column_px: int
    gap_px: int
    large: Lettering
    normal: Lettering
    small: Lettering

    def x(self, column: int) -> int:
        """Left edge of a column."""
        return self.gap_px + column * (self.column_px + self.gap_px)


def render(explanation: Explanation, frames: Sequence[Sequence[Image.Image]], *, note: str = "") -> Image.Image:
    """Draw an explanation.

    Args:
        explanation: scores and kept tokens.
        frames: pictures of each item in the explanation's order, one for each of its shown_steps.
        note: what else to say, small at the foot, such as the model's name.

    Returns:
        An RGB image.

    Raises:
        InvalidInput: frames do not fit the explanation.
    """
    rows = _rows(explanation, frames)
    columns = 2 + len(explanation.selections)
    side_px = _side_px(explanation, columns)
    sizes = [_fit(row.image.size, side_px) for row in rows]
    layout = _layout(explanation, max(max(width for width, _ in sizes), side_px * 2 // 3))
    gap = layout.gap_px

    prompt = layout.large.wrap(explanation.prompt, layout.x(columns) - 2 * gap, _MAX_TEXT_LINES)
    answers = [
        layout.large.wrap(selection.answer or "(no text)", layout.column_px, _MAX_TEXT_LINES)
        for selection in explanation.selections
    ]
    head_px = gap + layout.large.line_px * len(prompt) + gap
    answers_px = max((len(lines) for lines in answers), default=0) * layout.large.line_px
    body_px = head_px + layout.normal.line_px + layout.small.line_px + gap // 2 + answers_px + gap // 2
    counted = len(rows) > 1  # with one row, the column's heading has said it
    under_px = (layout.small.line_px if counted else 0) + gap
    row_px = [layout.small.line_px + height + gap // 4 + under_px for _, height in sizes]
    foot_px = body_px + sum(row_px)

    sheet = Image.new("RGB", (layout.x(columns), foot_px + layout.small.line_px + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    layout.large.draw(draw, (gap, gap), prompt, _INK)
    draw.line((gap, head_px - gap // 2, sheet.width - gap, head_px - gap // 2), _RULE, 1)
    score_range = _score_range(explanation.items)
    _draw_headings(sheet, explanation, answers, score_range, head_px, layout)
    y = body_px
    for row, size, height in zip(rows, sizes, row_px, strict=True):
        layout.small.draw(draw, (gap, y), [row.label], _MUTED)
        _draw_row(sheet, explanation, row, size, score_range, y + layout.small.line_px, layout, counted=counted)
        y += height
    layout.small.draw(draw, (gap, foot_px), [f"{_KEY} {note}".strip()], _MUTED)
    return sheet


def shown_steps(item: VisualItem) -> list[int]:
    """The steps of an item that are drawn: all, or some evenly spaced ones of a longer video."""
    count = item.grid[0]
    if item.kind == "image" or count <= MAX_FRAMES:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, MAX_FRAMES).tolist()]


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all.

    Raises:
        InvalidInput: the path cannot be written.
    """
    png = io.BytesIO()
    picture.save(png, format="PNG")
    write_atomically(path, png.getvalue())


def _rows(explanation: Explanation, frames: Sequence[Sequence[Image.Image]]) -> list[_Row]:
    steps = [shown_steps(item) for item in explanation.items]
    got, expected = [len(pictures) for pictures in frames], [len(shown) for shown in steps]
    if got != expected:
        raise InvalidInput(f"frames: got {got} pictures by item, expected {expected}")
    rows = []
    counts = {"image": 0, "video": 0}
    for index, (item, pictures, shown) in enumerate(zip(explanation.items, frames, steps, strict=True)):
        counts[item.kind] += 1
        time, height, width = item.grid
        for step, picture in zip(shown, pictures, strict=True):
            place = f"{item.kind} {counts[item.kind]}"
            if item.kind == "video" or time > 1:
                place += f", {'step' if item.kind == 'video' else 'tile'} {step + 1} of {time}"
            if step == shown[0]:
                place += f": {picture.width} x {picture.height} pixels, {width} x {height} tokens"
            rows.append(_Row(place, picture.convert("RGB"), index, step))
    return rows


def _side_px(explanation: Explanation, columns: int) -> int:
    """Longest side of a panel: enough for each token to be seen, within what a screen and a file can take."""
    longest = max(max(item.grid[1:]) for item in explanation.items)
    wished = min(max(_CELL_PX * longest, _MIN_PANEL_PX), _MAX_PANEL_PX)
    return min(wished, max(_MAX_WIDTH_PX // columns, _MIN_PANEL_PX // 2))


def _fit(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    scale = side_px / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _layout(explanation: Explanation, column_px: int) -> _Layout:
    texts = explanation.prompt + "".join(selection.answer or "" for selection in explanation.selections)
    size_px = min(max(column_px // 18, 14), 32)
    large, normal, small = (Lettering.of_size(px, texts) for px in (size_px * 6 // 5, size_px, size_px * 5 // 6))
    return _Layout(column_px, size_px * 5 // 4, large, normal, small)


def _score_range(items: Sequence[VisualItem]) -> tuple[float, float]:
    """The scores that the ramp spans: all but the extreme hundredths, so that one outlier leaves colour to the rest."""
    low, high = np.percentile(np.concatenate([item.scores.ravel() for item in items]), (1, 99))
    return float(low), float(high)


def _draw_headings(
    sheet: Image.Image,
    explanation: Explanation,
    answers: Sequence[Sequence[str]],
    score_range: tuple[float, float],
    y: int,
    layout: _Layout,
) -> None:
    draw = ImageDraw.Draw(sheet)
    total = explanation.num_visual
    headings = [("As given", f"{total} visual tokens"), ("HAWK scores", "")]
    for selection in explanation.selections:
        share = 100.0 * selection.num_kept / total
        detail = f"{selection.num_kept} of {total} kept ({share:.1f} %)"
        headings.append((f"Keep ratio {selection.keep_ratio:g}", detail))
    for column, (heading, detail) in enumerate(headings):
        below = layout.normal.draw(draw, (layout.x(column), y), [heading], _INK)
        below = layout.small.draw(draw, (layout.x(column), below), [detail], _MUTED)
        if column >= 2:
            layout.large.draw(draw, (layout.x(column), below + layout.gap_px // 2), answers[column - 2], _INK)
    _draw_ramp(sheet, (layout.x(1), y + layout.normal.line_px), score_range, layout)


def _draw_ramp(sheet: Image.Image, place: tuple[int, int], score_range: tuple[float, float], layout: _Layout) -> None:
    x, y = place
    height_px = layout.small.line_px * 2 // 3
    bar = np.repeat(colours(np.linspace(0.0, 1.0, layout.column_px))[None], height_px, axis=0)
    sheet.paste(Image.fromarray(bar), (x, y))
    low, high = (f"{score:.2g}" for score in score_range)
    draw = ImageDraw.Draw(sheet)
    y += height_px + layout.gap_px // 4
    layout.small.draw(draw, (x, y), [low], _MUTED)
    layout.small.draw(draw, (x + layout.column_px - layout.small.width_px(high), y), [high], _MUTED)


def _draw_row(
    sheet: Image.Image,
    explanation: Explanation,
    row: _Row,
    size: tuple[int, int],
    score_range: tuple[float, float],
    y: int,
    layout: _Layout,
    *,
    counted: bool,
) -> None:
    draw = ImageDraw.Draw(sheet)
    image = row.image.resize(size, Image.Resampling.LANCZOS)
    masks = [selection.kept[row.item][row.step] for selection in explanation.selections]
    panels = [image, heat_panel(image, explanation.items[row.item].scores[row.step], score_range)]
    panels += [kept_panel(image, mask) for mask in masks]
    for column, panel in enumerate(panels):
        x = layout.x(column)
        sheet.paste(panel, (x, y))
        draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_RULE)
        if counted and column >= 2:
            mask = masks[column - 2]
            below = (x, y + size[1] + layout.gap_px // 4)
            layout.small.draw(draw, below, [f"{int(mask.sum())} of {mask.size} kept"], _MUTED)
