"""The prompts that parity compares: the caller's images and questions, or generated ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Manifest
from hawk_trt.models.family import TokenRun, family_by_name
from hawk_trt.request import ModelInputs

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.request import ImageInput

DEFAULT_PROMPT = "Describe what is shown."
_TEXT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ParityCase:
    """A named prompt, as the tensors that both sides get."""

    name: str
    inputs: ModelInputs


def given_cases(
    pipe: "Pipeline", prompts: Sequence[str], images: Sequence[Path], videos: Sequence[Path], *, together: bool
) -> list[ParityCase]:
    """Every prompt with every image and video, or with all of them together."""
    groups: list[tuple[list[Path], list[Path]]] = [([image], []) for image in images]
    groups += [([], [video]) for video in videos]
    if together:
        groups = [(list(images), list(videos))]
    cases = []
    for number, prompt in enumerate(prompts, start=1):
        for shown, played in groups:
            name = ", ".join(path.name for path in (*shown, *played))
            name += f", prompt {number}" if len(prompts) > 1 else ""
            cases.append(ParityCase(name, pipe.prepare(prompt, shown, played)))
    return cases


def generated_cases(pipe: "Pipeline", prompts: Sequence[str], seed: int) -> list[ParityCase]:
    """Every prompt with noise, with a gradient, with two images and alone."""
    rng = np.random.default_rng(seed)
    shown: dict[str, list[ImageInput]] = {
        "noise 224x224": [_noise(rng, 224, 224)],
        "gradient 336x196": [_gradient(336, 196)],
        "two images": [_gradient(168, 112), _noise(rng, 112, 224)],
        "text only": [],
    }
    cases = []
    for number, prompt in enumerate(prompts, start=1):
        for name, images in shown.items():
            numbered = f"{name}, prompt {number}" if len(prompts) > 1 else name
            cases.append(ParityCase(numbered, pipe.prepare(prompt, images)))
    return cases


def tensor_cases(manifest: Manifest, seed: int, *, only_video: bool = False) -> list[ParityCase]:
    """Noise and text tokens between special ones: needs no tokenizer, and no template that takes video."""
    rng = np.random.default_rng(seed)
    shown: dict[str, tuple[list[tuple[int, int]], int]] = {
        "image 224x224": ([(224, 224)], 0),
        "image 336x140": ([(336, 140)], 0),
        "two images": ([(168, 112), (112, 168)], 0),
        "text only": ([], 0),
    }
    if only_video:
        shown = {}
    if manifest.special_tokens.video is not None:
        shown["video of 6 frames"] = ([], 6)
    return [ParityCase(name, random_inputs(manifest, rng, sizes, frames)) for name, (sizes, frames) in shown.items()]


def random_inputs(
    manifest: Manifest, rng: np.random.Generator, sizes: list[tuple[int, int]], num_frames: int
) -> ModelInputs:
    """A prompt with images of these widths and heights, or with a video of so many frames."""
    family, vision, tokens = family_by_name(manifest.family), manifest.vision, manifest.special_tokens
    known = (tokens.image, tokens.video, tokens.vision_start, tokens.vision_end, tokens.im_start, tokens.im_end)
    special = [token for token in (*known, tokens.pad, *tokens.eos) if token is not None]
    plain = np.setdiff1d(np.arange(manifest.language.vocab_size), special)

    def text(count: int) -> list[int]:
        drawn: list[int] = rng.choice(plain, count).tolist()
        return drawn

    # A checkpoint without a tokenizer may not know these two, which any token can stand in for.
    start, end = (text(1)[0] if token is None else token for token in (tokens.vision_start, tokens.vision_end))
    filled = replace(tokens, vision_start=start, vision_end=end)
    settings = family.image_settings({}, vision)
    images = [_noise(rng, width, height) for width, height in sizes]
    frames = [_noise(rng, 112, 112) for _ in range(num_frames)]
    patches = {
        "image": family.images_to_patches(images, settings, vision) if images else None,
        "video": family.video_to_patches(frames, settings, vision) if frames else None,
    }
    ids: list[int] = [*([] if tokens.im_start is None else [tokens.im_start]), *text(_TEXT_TOKENS)]
    kinds = []
    for kind, shown in patches.items():
        for grid in [] if shown is None else shown.grid_thw.tolist():
            kinds.append(kind)
            parts = family.placeholder(kind, grid, [frame / 2 for frame in range(num_frames)], vision, filled)
            if TokenRun(end) not in parts:  # then the templates have the tokens around an image
                parts = (TokenRun(start), *parts, TokenRun(end))
            for part in parts:
                ids += text(2) if isinstance(part, str) else [part.token_id] * part.count
    ids += [*text(_TEXT_TOKENS), *([] if tokens.im_end is None else [tokens.im_end]), *text(3)]
    return family.model_inputs(np.array(ids, dtype=np.int64), kinds, patches["image"], patches["video"], None)


def _noise(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _gradient(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Red from left to right, green from top to bottom, blue in rings."""
    y, x = np.mgrid[0:height, 0:width]
    rings = np.hypot(x - width / 2, y - height / 2) * 8 % 256
    return np.stack([x * 255 / width, y * 255 / height, rings], axis=-1).astype(np.uint8)
