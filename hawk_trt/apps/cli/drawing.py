"""Draws what a pipeline kept of the images that the options name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hawk_trt.apps.explain.explanation import Explanation
from hawk_trt.apps.explain.picture import load_frames, render, save

if TYPE_CHECKING:
    from hawk_trt import Pipeline


def draw(path: Path, explained: Explanation, args: argparse.Namespace, pipe: "Pipeline") -> None:
    """Write the picture of an explanation.

    Raises:
        InvalidInput: an image cannot be read, or the picture not be written.
    """
    manifest = pipe.bundle.manifest
    frames = load_frames(explained, pipe, args.image, args.video, args.fps, args.max_frames)
    model = f"{Path(manifest.source.name).name}, {manifest.precision}"
    note = f"{model}. Scores: {manifest.normalization}, query {args.query or 'default'}, quota {args.quota}."
    save(render(explained, frames, note=note), path)
