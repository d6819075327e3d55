"""Which visual tokens HAWK keeps, and why: its scores and choices laid out on the images they come from.

A prompt's tensors and its results at some keep ratios enter; an Explanation leaves, plain data that
picture.render draws and `hawk-trt explain --json` prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.request import ModelInputs, Result

Kind = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class VisualItem:
    """One image or video of the prompt.

    Attributes:
        kind: "image" or "video".
        grid: visual tokens in time, height and width; an image has one step in time, or one for each of its tiles.
        scores: float32 [time, height, width], HAWK's score of each token.
    """

    kind: Kind
    grid: tuple[int, int, int]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Selection:
    """What one keep ratio kept.

    Attributes:
        keep_ratio: share of visual tokens asked for.
        num_kept: visual tokens kept.
        answer: text generated from the kept tokens, None without a tokenizer.
        kept: bool [time, height, width] for each item.
    """

    keep_ratio: float
    num_kept: int
    answer: str | None
    kept: tuple[npt.NDArray[np.bool_], ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prompt's images and videos, their scores, and what each keep ratio kept of them."""

    prompt: str
    num_visual: int
    items: tuple[VisualItem, ...]
    selections: tuple[Selection, ...]


def explain(
    prompt: str,
    inputs: ModelInputs,
    results: Sequence[tuple[float, Result]],
    special_tokens: SpecialTokens,
    spatial_merge_size: int,
) -> Explanation:
    """Lay scores and kept tokens out on the token grids of the images, then of the videos.

    Args:
        prompt: text to show; nothing is computed from it.
        inputs: the tensors of the prompt that every result answers.
        results: (keep_ratio, result) pairs, at least one.
        special_tokens: of the bundle, to tell image from video placeholders.
        spatial_merge_size: patches that one token spans, in height and in width.

    Raises:
        InvalidInput: the prompt has no visual token, or grids, placeholders and results do not fit each other.
    """
    input_ids = np.asarray(inputs.input_ids, np.int64).reshape(-1)
    attended = np.ones(input_ids.shape, np.bool_)
    if inputs.attention_mask is not None:
        attended = np.asarray(inputs.attention_mask).reshape(-1) != 0
    is_image = attended & (input_ids == _id(special_tokens.image))
    is_video = attended & (input_ids == _id(special_tokens.video))
    positions = np.flatnonzero(is_image | is_video)
    if not positions.size:
        raise InvalidInput("prompt: it has no image or video, so there is nothing to explain")
    for _, result in results:
        if result.scores.shape != positions.shape:
            raise InvalidInput(
                f"scores: got {result.scores.size} values, expected {positions.size}, one a visual token of the prompt"
            )
    from_video = is_video[positions]
    image_grids = _token_grids(inputs.image_grid_thw, spatial_merge_size)
    video_grids = _token_grids(inputs.video_grid_thw, spatial_merge_size)

    def lay_out(values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        return _split(values[~from_video], image_grids, "image") + _split(values[from_video], video_grids, "video")

    scores = [grid.astype(np.float32) for grid in lay_out(results[0][1].scores)]
    items = [
        VisualItem("image" if index < len(image_grids) else "video", grid, score)
        for index, (grid, score) in enumerate(zip(image_grids + video_grids, scores, strict=True))
    ]
    selections = [
        Selection(
            keep_ratio,
            result.num_kept,
            result.text,
            tuple(grid.astype(np.bool_) for grid in lay_out(np.isin(positions, result.kept_indices))),
        )
        for keep_ratio, result in results
    ]
    return Explanation(prompt, positions.size, tuple(items), tuple(selections))


def _id(token: int | None) -> int:
    """A token id that no prompt holds where the checkpoint has no such token."""
    return -1 if token is None else token


def _token_grids(grid_thw: npt.ArrayLike | None, merge: int) -> list[tuple[int, int, int]]:
    if grid_thw is None:
        return []
    return [(int(t), int(h) // merge, int(w) // merge) for t, h, w in np.asarray(grid_thw).reshape(-1, 3)]


def _split(
    values: npt.NDArray[np.generic], grids: Sequence[tuple[int, int, int]], kind: Kind
) -> list[npt.NDArray[np.generic]]:
    sizes = [t * h * w for t, h, w in grids]
    if sum(sizes) != values.size:
        raise InvalidInput(f"{kind}_grid_thw: its grids hold {sum(sizes)} tokens, the prompt has {values.size}")
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(grid) for part, grid in zip(parts, grids, strict=True)]
