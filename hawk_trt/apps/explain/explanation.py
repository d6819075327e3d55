"""Which visual tokens are kept, and why: scores and choices laid out on the images they come from.

A prompt and its results at some keep ratios enter; an Explanation leaves, plain data that picture.render draws and
`hawk-trt explain --json` prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.inputs.layout import PromptLayout
from hawk_trt.request import Result


@dataclass(frozen=True, slots=True)
class VisualItem:
    """One image or video of the prompt.

    grid: visual tokens in time, height and width; an image has one step in time, or one for each of its tiles.
    scores: [time, height, width], HAWK's score of each token.
    """

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Selection:
    """What one keep ratio kept, and the text generated from it, None without a tokenizer."""

    keep_ratio: float
    num_kept: int
    answer: str | None
    kept: tuple[npt.NDArray[np.bool_], ...]  # [time, height, width] for each item


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prompt's images and videos, their scores, and what the selector kept of them at each keep ratio.

    query is Result.query: which text scored them.
    """

    prompt: str
    selector: str
    num_visual: int
    items: tuple[VisualItem, ...]
    selections: tuple[Selection, ...]
    query: str = "paper"


def explain(
    prompt: str,
    layout: PromptLayout,
    results: Sequence[tuple[float, Result]],
    spatial_merge_size: int,
    selector: str = "hawk",
) -> Explanation:
    """Lay scores and kept tokens out on the token grids of the images, then of the videos.

    prompt: text to show; nothing is computed from it. results: (keep_ratio, result) pairs, all of the layout's prompt,
    no position of which is masked.
    """
    visual = layout.visual_rows >= 0
    owners, places = layout.items[visual], layout.source_index[visual]
    items = []
    for number, (time, height, width) in enumerate([*layout.image_grid_thw.tolist(), *layout.video_grid_thw.tolist()]):
        grid = (time, height // spatial_merge_size, width // spatial_merge_size)
        own = owners == number
        kind: Literal["image", "video"] = "image" if number < len(layout.image_grid_thw) else "video"
        items.append(VisualItem(kind, grid, results[0][1].scores[own].reshape(grid)))
    selections = [
        Selection(
            keep_ratio,
            result.num_kept,
            result.text,
            tuple(
                np.isin(places[owners == number], result.kept_indices).reshape(item.grid)
                for number, item in enumerate(items)
            ),
        )
        for keep_ratio, result in results
    ]
    return Explanation(prompt, selector, layout.num_visual, tuple(items), tuple(selections), results[0][1].query)
