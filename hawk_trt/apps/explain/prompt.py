"""The explanation of a prompt that a pipeline answered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hawk_trt.apps.explain import Explanation, explain
from hawk_trt.request import ModelInputs, Result

if TYPE_CHECKING:
    from hawk_trt import Pipeline


def explanation(
    pipe: "Pipeline", text: str, inputs: ModelInputs, results: Sequence[tuple[float, Result]]
) -> Explanation:
    """Lay out (keep_ratio, result) pairs of one prompt.

    Raises:
        InvalidInput: the prompt has no visual token.
    """
    manifest = pipe.bundle.manifest
    layout = pipe.layout(inputs)  # it knows the grids, whether the inputs hold them or their placeholders say them
    grids = (layout.image_grid_thw, layout.video_grid_thw)
    inputs = replace(inputs, image_grid_thw=grids[0], video_grid_thw=grids[1])
    return explain(text, inputs, results, manifest.special_tokens, int(manifest.vision["spatial_merge_size"]))
