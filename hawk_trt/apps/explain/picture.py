"""The picture of an explanation: every image as given, its scores as a heat map, and what each keep ratio kept.

Columns are the original, the scores and the keep ratios, with the answers above; rows are the images and
the frames of the videos. Small images are scaled up and large ones down, so that text and tokens stay legible.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from hawk_trt.apps.explain.explanation import Explanation, VisualItem
from hawk_trt.apps.explain.lettering import Lettering
from hawk_trt.apps.explain.panels import colours, heat_panel, kept_panel
from hawk_trt.errors import InvalidInput
from hawk_trt.files import write_atomically
from hawk_trt.inputs import messages
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.video import load_video
from hawk_trt.request import EQUAL_HEADS, SCORED

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.request import ImageInput, VideoInput

MAX_FRAMES = 6  # of one video

_PAPER = (255, 255, 255)
_INK = (31, 35, 40)
_MUTED = (101, 109, 118)
_RULE = (208, 215, 222)
_CELL_PX = 14  # wished for one token
_MIN_PANEL_PX, _MAX_PANEL_PX, _MAX_WIDTH_PX = 300, 720, 3600
_MAX_TEXT_LINES = 6


@dataclass(frozen=True, slots=True)
class _Row:
    """One image or frame: its label, its pixels as they are drawn, and its place in the explanation."""

    label: str
    image: Image.Image
    item: int
    step: int


def load_frames(
    explanation: Explanation,
    pipe: "Pipeline",
    images: "Sequence[ImageInput]",
    videos: "Sequence[VideoInput]",
    fps: float | None = None,
    max_frames: int | None = None,
) -> list[list[Image.Image]]:
    """The frames that render takes, from the images and videos of the prompt.

    Raises:
        InvalidInput: one of them cannot be read.
    """
    items = iter(explanation.items)
    frames: list[list[Image.Image]] = []
    for image in images:
        item = next(items)
        parts = pipe.family.image_parts(load_image(image), item.grid[0])
        frames.append([Image.fromarray(parts[step]) for step in shown_steps(item)])
    for source in videos:
        shown = messages.VisualItem("video", source, fps=fps, max_frames=max_frames)
        video = load_video(shown, pipe.family.frame_numbers).frames
        numbers = list(range(0, len(video), pipe.family.vision.temporal_patch_size))
        while numbers:  # one item for the video, or one for each of its frames
            item = next(items)
            frames.append([Image.fromarray(video[numbers[step]]) for step in shown_steps(item)])
            numbers = numbers[item.grid[0] :]
    return frames


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
    columns = 2 + len(explanation.selections)
    side_px = _side_px(explanation, columns)
    rows = _rows(explanation, frames, side_px)
    column_px = max(side_px * 2 // 3, *(row.image.width for row in rows))
    texts = explanation.prompt + "".join(selection.answer or "" for selection in explanation.selections)
    size_px = min(max(column_px // 18, 14), 32)
    large, normal, small = (Lettering.of_size(px, texts) for px in (size_px * 6 // 5, size_px, size_px * 5 // 6))
    gap = size_px * 5 // 4
    lefts = [gap + column * (column_px + gap) for column in range(columns + 1)]

    prompt = large.wrap(explanation.prompt, lefts[-1] - 2 * gap, _MAX_TEXT_LINES)
    answers = [large.wrap(one.answer or "(no text)", column_px, _MAX_TEXT_LINES) for one in explanation.selections]
    counted = len(rows) > 1  # with one row, the column's heading has said it
    head_px = 2 * gap + large.line_px * len(prompt)
    answers_px = max((len(lines) for lines in answers), default=0) * large.line_px
    body_px = head_px + normal.line_px + small.line_px + answers_px + gap // 2 + gap // 2
    around_px = small.line_px * (2 if counted else 1) + gap // 4 + gap
    foot_px = body_px + sum(row.image.height + around_px for row in rows)

    sheet = Image.new("RGB", (lefts[-1], foot_px + small.line_px + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large.draw(draw, (gap, gap), prompt, _INK)
    draw.line((gap, head_px - gap // 2, sheet.width - gap, head_px - gap // 2), _RULE, 1)
    for left, (heading, detail) in zip(lefts, _headings(explanation), strict=False):
        below = normal.draw(draw, (left, head_px), [heading], _INK)
        small.draw(draw, (left, below), [detail], _MUTED)
    for left, lines in zip(lefts[2:], answers, strict=False):
        large.draw(draw, (left, head_px + normal.line_px + small.line_px + gap // 2), lines, _INK)
    score_range = _score_range(explanation.items)
    _draw_ramp(sheet, (lefts[1], head_px + normal.line_px), column_px, score_range, small)
    y = body_px
    for row in rows:
        small.draw(draw, (gap, y), [row.label], _MUTED)
        masks = [selection.kept[row.item][row.step] for selection in explanation.selections]
        heat = heat_panel(row.image, explanation.items[row.item].scores[row.step], score_range)
        panels = [row.image, heat, *(kept_panel(row.image, mask) for mask in masks)]
        top = y + small.line_px
        bottom = top + row.image.height
        for left, panel in zip(lefts, panels, strict=False):
            sheet.paste(panel, (left, top))
            draw.rectangle((left - 1, top - 1, left + panel.width, bottom), outline=_RULE)
        for left, mask in zip(lefts[2:], masks if counted else (), strict=False):
            small.draw(draw, (left, bottom + gap // 4), [f"{int(mask.sum())} of {mask.size} kept"], _MUTED)
        y += row.image.height + around_px
    small.draw(draw, (gap, foot_px), [f"Kept tokens in full colour, dropped tokens dimmed. {note}".strip()], _MUTED)
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


def _rows(explanation: Explanation, frames: Sequence[Sequence[Image.Image]], side_px: int) -> list[_Row]:
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
            label = f"{item.kind} {counts[item.kind]}"
            if item.kind == "video" or time > 1:
                label += f", {'step' if item.kind == 'video' else 'tile'} {step + 1} of {time}"
            if step == shown[0]:
                label += f": {picture.width} x {picture.height} pixels, {width} x {height} tokens"
            scale = side_px / max(picture.size)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            rows.append(_Row(label, picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), index, step))
    return rows


def _side_px(explanation: Explanation, columns: int) -> int:
    """Longest side of a panel: enough for each token to be seen, within what a screen and a file can take."""
    longest = max(max(item.grid[1:]) for item in explanation.items)
    wished = min(max(_CELL_PX * longest, _MIN_PANEL_PX), _MAX_PANEL_PX)
    return min(wished, max(_MAX_WIDTH_PX // columns, _MIN_PANEL_PX // 2))


def _score_range(items: Sequence[VisualItem]) -> tuple[float, float]:
    """The scores that the ramp spans: all but the extreme hundredths, so that one outlier leaves colour to the rest."""
    low, high = np.percentile(np.concatenate([item.scores.ravel() for item in items]), (1, 99))
    return float(low), float(high)


def _headings(explanation: Explanation) -> list[tuple[str, str]]:
    """Heading and detail of each column. The scores are shown whoever chooses, so the headings say who does."""
    selector, total = explanation.selector, explanation.num_visual
    scores = f"Scores of {selector}" if selector in EQUAL_HEADS else "HAWK scores"
    scores += "" if selector in SCORED else f", not used by {selector}"
    headings = [("As given", f"{total} visual tokens"), (scores, "")]
    for selection in explanation.selections:
        share = 100.0 * selection.num_kept / total
        chooser = "" if selector == "hawk" else f" by {selector}"
        detail = f"{selection.num_kept} of {total} kept{chooser} ({share:.1f} %)"
        headings.append((f"Keep ratio {selection.keep_ratio:g}", detail))
    return headings


def _draw_ramp(
    sheet: Image.Image, place: tuple[int, int], width_px: int, score_range: tuple[float, float], small: Lettering
) -> None:
    """The colours of the scores, with the lowest and the highest score below them."""
    x, y = place
    height_px = small.line_px * 2 // 3
    bar = np.repeat(colours(np.linspace(0.0, 1.0, width_px))[None], height_px, axis=0)
    sheet.paste(Image.fromarray(bar), (x, y))
    draw = ImageDraw.Draw(sheet)
    low, high = f"low: {score_range[0]:.2g}", f"high: {score_range[1]:.2g}"
    small.draw(draw, (x, y + height_px), [low], _MUTED)
    small.draw(draw, (x + width_px - small.width_px(high), y + height_px), [high], _MUTED)
