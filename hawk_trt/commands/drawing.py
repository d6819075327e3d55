"""Draws what a pipeline kept of the images that the options name."""

import argparse
from collections.abc import Sequence
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
    return explain(text, inputs, results, manifest.special_tokens, int(manifest.vision["spatial_merge_size"]))


def draw(path: Path, explained: Explanation, args: argparse.Namespace, pipe: "Pipeline") -> None:
    """Write the picture of an explanation.

    Raises:
        InvalidInput: an image cannot be read, or the picture not be written.
    """
    manifest = pipe.bundle.manifest
    frames = [[Image.fromarray(load_image(source))] for source in args.image]
    every = int(manifest.vision["temporal_patch_size"])
    for source, item in zip(args.video, explained.items[len(frames) :], strict=True):
        video = load_video(source, sampler=pipe.family.frame_numbers).frames
        frames.append([Image.fromarray(video[step * every]) for step in shown_steps(item)])
    model = f"{Path(manifest.source.name).name}, {manifest.dtype}"
    note = f"{model}. Scores: {manifest.normalization}, query {args.query}, quota {args.quota}."
    save(render(explained, frames, note=note), path)
