"""The prompts that parity compares: the caller's images and questions, or generated ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Manifest
from hawk_trt.request import ModelInputs
from hawk_trt.runtime.reference import tensor_prompts

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.request import ImageInput, VideoInput

DEFAULT_PROMPT = "Describe what is shown."


@dataclass(frozen=True, slots=True)
class ParityCase:
    """A named prompt, as the tensors that both sides get."""

    name: str
    inputs: ModelInputs


def given_cases(
    pipe: "Pipeline", prompts: Sequence[str], images: Sequence[Path], videos: Sequence[Path], *, together: bool
) -> list[ParityCase]:
    """Every prompt with every image and video, or with all of them together."""
    groups: list[tuple[Sequence[Path], Sequence[Path]]] = [([image], []) for image in images]
    groups += [([], [video]) for video in videos]
    if together:
        groups = [(images, videos)]
    named = [(", ".join(path.name for path in (*shown, *played)), shown, played) for shown, played in groups]
    return _cases(pipe, prompts, named)


def generated_cases(pipe: "Pipeline", prompts: Sequence[str], seed: int) -> list[ParityCase]:
    """Every prompt with noise, with a gradient, with two images and alone."""
    rng = np.random.default_rng(seed)
    shown: dict[str, list[ImageInput]] = {
        "noise 224x224": [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)],
        "gradient 336x196": [_gradient(336, 196)],
        "two images": [_gradient(168, 112), rng.integers(0, 256, (224, 112, 3), dtype=np.uint8)],
        "text only": [],
    }
    return _cases(pipe, prompts, [(name, images, []) for name, images in shown.items()])


def tensor_cases(manifest: Manifest, seed: int, *, only_video: bool = False) -> list[ParityCase]:
    """Noise and text tokens between special ones: needs no tokenizer, and no template that takes video."""
    cases = [ParityCase(name, inputs) for name, inputs in tensor_prompts(manifest, seed).items()]
    return [case for case in cases if not only_video or case.name.startswith("video")]


def _cases(
    pipe: "Pipeline", prompts: Sequence[str], shown: "Sequence[tuple[str, Sequence[ImageInput], Sequence[VideoInput]]]"
) -> list[ParityCase]:
    return [
        ParityCase(f"{name}, prompt {number}" if len(prompts) > 1 else name, pipe.prepare(prompt, images, videos))
        for number, prompt in enumerate(prompts, start=1)
        for name, images, videos in shown
    ]


def _gradient(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Red from left to right, green from top to bottom, blue in rings."""
    y, x = np.mgrid[0:height, 0:width]
    rings = np.hypot(x - width / 2, y - height / 2) * 8 % 256
    return np.stack([x * 255 / width, y * 255 / height, rings], axis=-1).astype(np.uint8)
