"""Draws what a pipeline kept of the images that the options name."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from hawk_trt.explain import Explanation, explain
from hawk_trt.explain.picture import render, save, shown_steps
from hawk_trt.images import load_image
from hawk_trt.requests import ModelInputs, Result
from hawk_trt.video import load_video

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


def draw(path: Path, explained: Explanation, args: argparse.Namespace, pipe: "Pipeline") -> None:
    """Write the picture of an explanation.

    Raises:
        InvalidInput: an image cannot be read, or the picture not be written.
    """
    manifest = pipe.bundle.manifest
    items = iter(explained.items)
    frames: list[list[Image.Image]] = []
    for source in args.image:
        item = next(items)
        parts = pipe.family.image_parts(load_image(source), item.grid[0], manifest.vision)
        frames.append([Image.fromarray(parts[step]) for step in shown_steps(item)])
    every = int(manifest.vision["temporal_patch_size"])
    for source in args.video:
        video = load_video(source, sampler=pipe.family.frame_numbers).frames
        steps = list(range(0, len(video), every))
        while steps:  # one item for the video, or one for each of its frames
            item = next(items)
            frames.append([Image.fromarray(video[steps[step]]) for step in shown_steps(item)])
            steps = steps[item.grid[0] :]
    model = f"{Path(manifest.source.name).name}, {manifest.dtype}"
    note = f"{model}. Scores: {manifest.normalization}, query {args.query}, quota {args.quota}."
    save(render(explained, frames, note=note), path)
