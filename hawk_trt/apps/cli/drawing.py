"""Draws what a pipeline kept of the images that the options name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from hawk_trt.apps.explain import Explanation
from hawk_trt.apps.explain.picture import render, save, shown_steps
from hawk_trt.inputs.images import load_image
from hawk_trt.inputs.video import load_video

if TYPE_CHECKING:
    from hawk_trt import Pipeline


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
    model = f"{Path(manifest.source.name).name}, {manifest.precision}"
    note = f"{model}. Scores: {manifest.normalization}, query {args.query}, quota {args.quota}."
    save(render(explained, frames, note=note), path)
