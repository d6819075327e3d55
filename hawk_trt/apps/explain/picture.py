"""The picture of an explanation: every image as given, its scores as a heat map, and what each keep ratio kept.

Columns are the original, the scores and the keep ratios, with the answers above, at most four beside each other; rows
are the images and the frames of the videos. Large images are shrunk, and small ones enlarged by a whole number, so that
their pixels stay sharp.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from hawk_trt.apps.explain.explanation import Explanation, VisualItem
from hawk_trt.apps.explain.lettering import Lettering
from hawk_trt.files.staging import write_atomically
from hawk_trt.inputs import turns
from hawk_trt.inputs.images import load_image
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
_MIN_PANEL_PX, _MAX_PANEL_PX = 300, 720
_MOST_COLUMNS = 4  # beside each other; more go below
_MAX_TEXT_LINES = 6
_LEGEND = (
    "Kept tokens in full colour, dropped tokens dimmed. A token's score says how much it has to do with {}: "
    "dark is little, bright is much."
)

# Neither white nor black, so that dropped tokens differ from kept ones on any image.
_DIM = (200, 206, 214)
_DIM_SHARE = 0.78
_HEAT_SHARE = 0.62
_OUTLINE = (214, 51, 108)
# Viridis at ten even steps: perceptually uniform, and readable without colour vision.
_STEPS = "#440154 #482878 #3e4989 #31688e #26828e #1f9e89 #35b779 #6dcd59 #b4de2c #fde725"
_RAMP = np.array([ImageColor.getrgb(step) for step in _STEPS.split()], np.float64)


@dataclass(frozen=True, slots=True)
class _Row:
    """One image or frame: its label, its pixels as they are drawn, and its place in the explanation."""

    label: str
    image: Image.Image
    item: int
    step: int


@dataclass(frozen=True, slots=True)
class _View:
    """A column: what stands above it, its panel of each row, and the kept tokens of each item if it shows some."""

    heading: str
    detail: str
    panel: Callable[[_Row], Image.Image]
    answer: str = ""
    kept: tuple[npt.NDArray[np.bool_], ...] | None = None


def load_frames(
    explanation: Explanation,
    pipe: "Pipeline",
    images: "Sequence[ImageInput]",
    videos: "Sequence[VideoInput]",
    fps: float | None = None,
    max_frames: int | None = None,
) -> list[list[Image.Image]]:
    """The frames that render takes, from the images and videos of the prompt."""
    items = iter(explanation.items)
    frames: list[list[Image.Image]] = []
    for image in images:
        item = next(items)
        parts = pipe.family.image_parts(load_image(image), item.grid[0])
        frames.append([Image.fromarray(parts[step]) for step in shown_steps(item)])
    for source in videos:
        shown = turns.VisualItem("video", source, fps=fps, max_frames=max_frames)
        video = pipe.processor.open_video(shown).frames
        numbers = list(range(0, len(video), pipe.family.vision.temporal_patch_size))
        while numbers:  # one item for the video, or one for each of its frames
            item = next(items)
            frames.append([Image.fromarray(video[numbers[step]]) for step in shown_steps(item)])
            numbers = numbers[item.grid[0] :]
    return frames


def render(explanation: Explanation, frames: Sequence[Sequence[Image.Image]], *, note: str = "") -> Image.Image:
    """Draw an explanation in RGB.

    frames: pictures of each item in the explanation's order, one for each of its shown_steps. note: what else to say,
    small at the foot, such as the model's name.
    """
    # enough for each token to be seen, within what a screen and a file can take
    longest = max(max(item.grid[1:]) for item in explanation.items)
    side_px = min(max(_CELL_PX * longest, _MIN_PANEL_PX), _MAX_PANEL_PX)
    rows = _rows(explanation, frames, side_px)
    column_px = max(side_px * 2 // 3, *(row.image.width for row in rows))
    texts = explanation.prompt + "".join(selection.answer or "" for selection in explanation.selections)
    size_px = min(max(column_px // 18, 14), 32)
    large, normal, small = (Lettering.of_size(px, texts) for px in (size_px * 6 // 5, size_px, size_px * 5 // 6))
    gap = size_px * 5 // 4
    # all but the extreme hundredths, so that one outlier leaves colour to the rest
    low, high = np.percentile(np.concatenate([item.scores.ravel() for item in explanation.items]), (1, 99)).tolist()
    score_range = low, high
    views = _views(explanation, score_range)
    columns = math.ceil(len(views) / math.ceil(len(views) / _MOST_COLUMNS))
    bands = [views[start : start + columns] for start in range(0, len(views), columns)]
    lefts = [gap + column * (column_px + gap) for column in range(columns)]
    width_px = lefts[-1] + column_px + gap

    counted = len(rows) > 1  # with one row, the column's heading has said it
    above_px = normal.line_px + small.line_px + gap // 2
    around_px = small.line_px * (2 if counted else 1) + gap // 4 + gap
    prompt = large.wrap(explanation.prompt, width_px - 2 * gap, _MAX_TEXT_LINES)
    answers = [[large.wrap(view.answer, column_px, _MAX_TEXT_LINES) for view in band] for band in bands]
    answers_px = [large.line_px * max(map(len, of_band)) + gap // 2 for of_band in answers]
    rows_px = sum(row.image.height + around_px for row in rows)
    y = 2 * gap + large.line_px * len(prompt)
    legend = _LEGEND.format("the prompt's last token" if explanation.query == "last" else "the question")
    foot = small.wrap(f"{legend} {note}".strip(), width_px - 2 * gap, _MAX_TEXT_LINES)
    foot_px = y + sum(above_px + px + rows_px for px in answers_px)

    sheet = Image.new("RGB", (width_px, foot_px + small.line_px * len(foot) + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large.draw(draw, (gap, gap), prompt, _INK)
    for band, of_band, px in zip(bands, answers, answers_px, strict=True):
        draw.line((gap, y - gap // 2, width_px - gap, y - gap // 2), _RULE, 1)
        for left, view, lines in zip(lefts, band, of_band, strict=False):
            below = normal.draw(draw, (left, y), [view.heading], _INK)
            small.draw(draw, (left, below), [view.detail], _MUTED)
            large.draw(draw, (left, y + above_px), lines, _INK)
        if band is bands[0]:
            _draw_ramp(sheet, (lefts[1], y + normal.line_px + small.line_px // 4), column_px, score_range, small)
        y += above_px + px
        for row in rows:
            small.draw(draw, (gap, y), [row.label], _MUTED)
            top, bottom = y + small.line_px, y + small.line_px + row.image.height
            for left, view in zip(lefts, band, strict=False):
                panel = view.panel(row)
                sheet.paste(panel, (left, top))
                draw.rectangle((left - 1, top - 1, left + panel.width, bottom), outline=_RULE)
                if counted and view.kept is not None:
                    mask = view.kept[row.item][row.step]
                    small.draw(draw, (left, bottom + gap // 4), [f"{int(mask.sum())} of {mask.size} kept"], _MUTED)
            y += row.image.height + around_px
    small.draw(draw, (gap, foot_px), foot, _MUTED)
    return sheet


def shown_steps(item: VisualItem) -> list[int]:
    """The steps of an item that are drawn: all, or some evenly spaced ones of a longer video."""
    count = item.grid[0]
    if item.kind == "image" or count <= MAX_FRAMES:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, MAX_FRAMES).tolist()]


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    write_atomically(path, png.getvalue())


def _rows(explanation: Explanation, frames: Sequence[Sequence[Image.Image]], side_px: int) -> list[_Row]:
    rows = []
    counts = {"image": 0, "video": 0}
    for index, (item, pictures) in enumerate(zip(explanation.items, frames, strict=True)):
        shown = shown_steps(item)
        counts[item.kind] += 1
        time, height, width = item.grid
        for step, picture in zip(shown, pictures, strict=True):
            label = f"{item.kind} {counts[item.kind]}"
            if item.kind == "video" or time > 1:
                label += f", {'step' if item.kind == 'video' else 'tile'} {step + 1} of {time}"
            if step == shown[0]:
                label += f": {picture.width} x {picture.height} pixels, {width} x {height} tokens"
            rows.append(_Row(label, _scaled(picture.convert("RGB"), side_px), index, step))
    return rows


def _scaled(picture: Image.Image, side_px: int) -> Image.Image:
    """Shrunk to a longest side, or enlarged to it and beyond by a whole number, each pixel to a square."""
    longest = max(picture.size)
    if longest < side_px:
        factor = math.ceil(side_px / longest) if longest * 2 <= _MAX_PANEL_PX else 1
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(edge * side_px / longest)) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _views(explanation: Explanation, score_range: tuple[float, float]) -> list[_View]:
    """The columns. HAWK's scores are shown whoever chooses, so the headings say who does."""
    selector, total, items = explanation.selector, explanation.num_visual, explanation.items
    scores = f"Scores of {selector}" if selector in EQUAL_HEADS else "HAWK scores"
    scores += "" if selector in SCORED else f", not used by {selector}"
    views = [
        _View("As given", f"{total} visual tokens", lambda row: row.image),
        _View(scores, "", lambda row: heat_panel(row.image, items[row.item].scores[row.step], score_range)),
    ]
    chooser = "" if selector == "hawk" else f" by {selector}"
    for one in explanation.selections:
        detail = f"{one.num_kept} of {total} kept{chooser} ({100.0 * one.num_kept / total:.1f} %)"
        panel = partial(lambda kept, row: kept_panel(row.image, kept[row.item][row.step]), one.kept)
        views.append(_View(f"Keep ratio {one.keep_ratio:g}", detail, panel, one.answer or "(no text)", one.kept))
    return views


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


def colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """The ramp's colours of values in [0, 1], clipped: uint8 [..., 3]."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), channel).round().astype(np.uint8) for channel in _RAMP.T]
    return np.stack(channels, -1)


def heat_panel(image: Image.Image, scores: npt.NDArray[np.float32], score_range: tuple[float, float]) -> Image.Image:
    """An RGB image in grey under its scores [height, width]; score_range: those at the ends of the ramp."""
    low, high = score_range
    share = (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)
    return Image.blend(_grey(image), _over(image, colours(share)), _HEAT_SHARE)


def kept_panel(image: Image.Image, kept: npt.NDArray[np.bool_]) -> Image.Image:
    """An RGB image with its dropped tokens grey and pale; around the kept ones goes a line where cells are large.

    kept: bool [height, width].
    """
    mask = _over(image, kept.astype(np.uint8) * 255)
    dimmed = Image.blend(_grey(image), Image.new("RGB", image.size, _DIM), _DIM_SHARE)
    panel = Image.composite(image, dimmed, mask)
    cell = min(image.height / kept.shape[0], image.width / kept.shape[1])
    line = 2 if cell >= 12 else 1 if cell >= 6 else 0
    if line:
        inside = mask.filter(ImageFilter.MinFilter(2 * line + 1))
        panel.paste(_OUTLINE, mask=ImageChops.subtract(mask, inside))
    return panel


def _over(image: Image.Image, cells: npt.NDArray[np.uint8]) -> Image.Image:
    """Cells [height, width, ...] of the token grid, as large as the image."""
    return Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")
