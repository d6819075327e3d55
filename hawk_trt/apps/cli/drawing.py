"""Draws what a pipeline kept of the images that the options name."""

from pathlib import Path
from typing import TYPE_CHECKING

from hawk_trt.apps.cli.options import Prompt, Pruning
from hawk_trt.apps.explain.explanation import Explanation
from hawk_trt.apps.explain.picture import load_frames, render, save

if TYPE_CHECKING:
    from hawk_trt import Pipeline


def draw(path: Path, explained: Explanation, prompt: Prompt, pruning: Pruning, pipe: "Pipeline") -> None:
    """Write the picture of an explanation.

    Raises:
        InvalidInput: an image cannot be read, or the picture not be written.
    """
    manifest = pipe.bundle.manifest
    frames = load_frames(explained, pipe, prompt.image, prompt.video, prompt.fps, prompt.max_frames)
    model = f"{Path(manifest.source.name).name}, {manifest.precision}"
    note = f"{model}. Scores: {manifest.normalization}, query {pruning.query or 'default'}, quota {pruning.quota}."
    save(render(explained, frames, note=note), path)
