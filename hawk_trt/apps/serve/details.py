"""What an answer tells of its making, where a request asks for it: times; scores and kept tokens of each image."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hawk_trt.apps.serve.prompt import Prepared
from hawk_trt.models.internvl import tile_grid
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.request import PruningConfig, Result, Timings

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline


_PRUNING = ("keep_ratio", "min_visual_tokens", "selector", "query", "quota", "keep_mass", "diversity")


def details_of(pipe: "Pipeline", prepared: Prepared, result: Result) -> dict[str, Any]:
    """The details of one answer, as plain JSON values.

    Returns:
        "keep_ratio" and the others of _PRUNING: of the request. "seconds": by stage. "images", one an image:
        "grid", its visual tokens in time, height and width (a tile is a step in time); "size", its width and height;
        "tiles", columns and rows, where it was cut into tiles: what is over in time is the whole image once more;
        "scores", one a visual token, row by row; "kept", the indices of the kept ones among these.
    """
    pruning = prepared.request.pruning or PruningConfig()
    details: dict[str, Any] = {name: getattr(pruning, name) for name in _PRUNING}
    details["query"] = result.query
    details["seconds"] = {stage.name: getattr(result.timings, stage.name) for stage in fields(Timings)}
    details["images"] = []
    if not result.num_visual:
        return details
    layout = pipe.processor.layout(replace(prepared.inputs, pixel_values=None))  # the places alone are read
    visual = layout.visual_rows >= 0
    items, is_kept = layout.items[visual], np.isin(layout.source_index[visual], result.kept_indices)
    merge = pipe.family.vision.spatial_merge_size
    for number, ((frames, rows, columns), (width, height)) in enumerate(
        zip(layout.image_grid_thw, prepared.sizes, strict=True)
    ):
        own = items == number
        details["images"].append(
            {
                "grid": [int(frames), int(rows) // merge, int(columns) // merge],
                "size": [width, height],
                "tiles": _tiles(pipe, int(frames), width, height),
                "scores": result.scores[own].tolist(),
                "kept": np.flatnonzero(is_kept[own]).tolist(),
            }
        )
    return details


def _tiles(pipe: "Pipeline", count: int, width: int, height: int) -> list[int] | None:
    vision = pipe.family.vision
    if count == 1 or not isinstance(vision, InternVLVision):
        return None
    count -= vision.use_thumbnail
    return list(tile_grid(height, width, vision.image_size, count, count))
