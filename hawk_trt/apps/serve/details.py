"""What an answer tells of its making, where a request asks for it: times; scores and kept tokens of each image."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hawk_trt.models.internvl_tiles import tile_grid
from hawk_trt.request import ModelInputs, PruningConfig, Result, Timings

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline


_TOLD = ("keep_ratio", "min_visual_tokens", "selector", "query", "quota", "keep_mass", "diversity")


def details_of(
    pipe: "Pipeline", inputs: ModelInputs, sizes: Sequence[tuple[int, int]], pruning: PruningConfig, result: Result
) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        pipe: that answered.
        inputs: the prompt.
        sizes: width and height of its images.
        pruning: of the request.
        result: the answer.

    Returns:
        "keep_ratio" and the others of _TOLD: of the pruning. "seconds": by stage. "images", one an image:
        "grid", its visual tokens in time, height and width (a tile is a step in time); "size", its width and height;
        "tiles", columns and rows, where it was cut into tiles: what is over in time is the whole image once more;
        "scores", one a visual token, row by row; "kept", the indices of the kept ones among these.
    """
    told: dict[str, Any] = {name: getattr(pruning, name) for name in _TOLD}
    told["seconds"] = {stage.name: getattr(result.timings, stage.name) for stage in fields(Timings)}
    told["images"] = []
    if not result.num_visual:
        return told
    layout = pipe.layout(inputs)
    visual = layout.visual_rows >= 0
    items, is_kept = layout.items[visual], np.isin(layout.source_index[visual], result.kept_indices)
    merge = int(pipe.bundle.manifest.vision["spatial_merge_size"])
    for number, ((frames, rows, columns), (width, height)) in enumerate(zip(layout.image_grid_thw, sizes, strict=True)):
        own = items == number
        told["images"].append(
            {
                "grid": [int(frames), int(rows) // merge, int(columns) // merge],
                "size": [width, height],
                "tiles": _tiles(pipe, int(frames), width, height),
                "scores": result.scores[own].tolist(),
                "kept": np.flatnonzero(is_kept[own]).tolist(),
            }
        )
    return told


def _tiles(pipe: "Pipeline", count: int, width: int, height: int) -> list[int] | None:
    if count == 1:
        return None
    vision = pipe.bundle.manifest.vision
    count -= bool(vision["use_thumbnail"])
    return list(tile_grid(height, width, vision["image_size"], count, count))
