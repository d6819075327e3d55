"""The prompts that parity compares: the caller's images and questions, or generated ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Manifest
from hawk_trt.families import family_by_name
from hawk_trt.requests import ModelInputs

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.requests import ImageInput

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
    """Random patches and text tokens between special ones: needs no tokenizer, and no template that takes video."""
    rng = np.random.default_rng(seed)
    grids: dict[str, tuple[list[list[int]], list[list[int]]]] = {
        "image 16x16 patches": ([[1, 16, 16]], []),
        "image 10x24 patches": ([[1, 10, 24]], []),
        "two images": ([[1, 8, 12], [1, 12, 8]], []),
        "text only": ([], []),
    }
    if only_video:
        grids = {}
    if manifest.special_tokens.video is not None:
        grids["video 3x8x8 patches"] = ([], [[3, 8, 8]])
    return [ParityCase(name, _random_inputs(manifest, rng, images, videos)) for name, (images, videos) in grids.items()]


def _random_inputs(
    manifest: Manifest, rng: np.random.Generator, images: list[list[int]], videos: list[list[int]]
) -> ModelInputs:
    family, tokens = family_by_name(manifest.family), manifest.special_tokens
    spec = family.vision_spec(manifest.vision, manifest.language.hidden_size)
    patch_dim = next(int(tensor.shape[-1]) for tensor in spec.inputs if tensor.name == "pixel_values")
    known = (tokens.image, tokens.video, tokens.vision_start, tokens.vision_end, tokens.im_start, tokens.im_end)
    special = [token for token in (*known, tokens.pad, *tokens.eos) if token is not None]
    plain = np.setdiff1d(np.arange(manifest.language.vocab_size), special)

    ids: list[int | None] = [tokens.im_start, *rng.choice(plain, _TEXT_TOKENS).tolist()]
    for kind, grids in ((tokens.image, images), (tokens.video, videos)):
        for grid in grids:
            count = int(family.tokens_per_item(np.array([grid], dtype=np.int64), manifest.vision)[0])
            ids += [tokens.vision_start, *[kind] * count, tokens.vision_end]
    ids += [*rng.choice(plain, _TEXT_TOKENS).tolist(), tokens.im_end, *rng.choice(plain, 3).tolist()]
    return ModelInputs(
        input_ids=np.array([token for token in ids if token is not None], dtype=np.int64),
        pixel_values=_patches(rng, images, patch_dim),
        image_grid_thw=np.array(images, dtype=np.int64) if images else None,
        pixel_values_videos=_patches(rng, videos, patch_dim),
        video_grid_thw=np.array(videos, dtype=np.int64) if videos else None,
    )


def _patches(rng: np.random.Generator, grids: list[list[int]], patch_dim: int) -> npt.NDArray[np.float32] | None:
    if not grids:
        return None
    return rng.standard_normal((int(np.prod(grids, axis=1).sum()), patch_dim), dtype=np.float32)


def _noise(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _gradient(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Red from left to right, green from top to bottom, blue in rings."""
    y, x = np.mgrid[0:height, 0:width]
    rings = np.hypot(x - width / 2, y - height / 2) * 8 % 256
    return np.stack([x * 255 / width, y * 255 / height, rings], axis=-1).astype(np.uint8)
