"""What every stage makes of a few fixed prompts: traced, kept in a small file, and compared on another machine.

    tensor_prompts(manifest)   -> prompts of noise and text tokens, the same on every machine
    trace(pipe, ...)           -> all that the stages of a loaded model make of one of them
    Reference.make(pipe)       -> what is kept of that: made in float32, written as reference.npz

A reference of a 7B takes a few hundred kilobytes: rows of a stage are kept as sketches (products with fixed random
directions, which keep lengths and angles), keys and values as their norms, logits at some token ids.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import msgspec
import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import MANIFEST, REFERENCE, Manifest, file_entry, manifest_bytes, read_manifest
from hawk_trt.errors import BundleError
from hawk_trt.files.staging import write_atomically
from hawk_trt.models import load_family
from hawk_trt.models.family import TokenRun
from hawk_trt.pipeline import Pipeline
from hawk_trt.request import ModelInputs, PruningConfig
from hawk_trt.runtime.trace import Trace, traced

STEPS = 8
_SCHEMA_VERSION = 2
_SEED = 0
_TEXT_TOKENS = 8
_SKETCH_SIZE = 64
# Of each step the most probable tokens, and of the vocabulary so many more.
BEST_LOGITS = 32
_OTHER_LOGITS = 128
Floats = npt.NDArray[np.float32]
_STORED = [field.name for field in fields(Trace) if field.name != "kept_indices"]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model made of its fixed prompts, by their names.

    made_by: the model and its runtime, for people.  model: a digest of all in a manifest that the outputs depend on.
    weights: how the language model's matrices were quantised, empty where they were not.
    """

    made_by: str
    model: str
    weights: str
    prompts: dict[str, Trace]

    @classmethod
    def make(cls, pipe: Pipeline) -> "Reference":
        """Trace every prompt; the model decodes its own most probable tokens."""
        manifest = pipe.bundle.manifest
        made_by = f"{manifest.source.name}, {manifest.precision}, {pipe.backend.name} on {pipe.backend.device}"
        prompts = {name: condensed(trace(pipe, inputs)) for name, inputs in tensor_prompts(manifest).items()}
        return cls(made_by, *model_of(manifest), prompts)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read reference.npz. Raises BundleError: not there, damaged, or of another version of hawk_trt."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                version, made_by, model, weights, *names = arrays["about"].tolist()
                if version != str(_SCHEMA_VERSION):
                    read = f"this hawk_trt reads {_SCHEMA_VERSION}"
                    raise BundleError(f"{path}: version {version}, {read}. Export again in float32, with --force")
                prompts = {
                    name: Trace(**{field: arrays[f"{number}.{field}"] for field in _STORED})
                    for number, name in enumerate(names)
                }
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            raise BundleError(f"{path}: no reference that can be read ({error}). Export again in float32") from error
        return cls(made_by, model, weights, prompts)

    def save(self, path: Path) -> None:
        """Write reference.npz whole or not at all."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "about": np.array([str(_SCHEMA_VERSION), self.made_by, self.model, self.weights, *self.prompts])
        }
        for number, outputs in enumerate(self.prompts.values()):
            arrays |= {f"{number}.{field}": getattr(outputs, field) for field in _STORED}
        content = BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # its stubs take names for an option
        write_atomically(path, content.getvalue())

    def put_into(self, folder: Path) -> None:
        """Add it to a bundle, whose manifest never tells of a file that is not whole.

        Raises BundleError: no bundle there, or one of another model; InvalidInput: the folder cannot be written.
        """
        manifest = read_manifest(folder)
        self.check(manifest)
        others = {name: entry for name, entry in manifest.files.items() if name != REFERENCE}
        write_atomically(folder / MANIFEST, manifest_bytes(replace(manifest, files=others)))
        self.save(folder / REFERENCE)
        others[REFERENCE] = file_entry(folder / REFERENCE)
        write_atomically(folder / MANIFEST, manifest_bytes(replace(manifest, files=others)))

    def check(self, manifest: Manifest) -> None:
        """Refuse, as a BundleError, to judge another model by it."""
        if self.model != model_of(manifest)[0]:
            raise BundleError(
                f"{REFERENCE}: made by {self.made_by}, which is not {manifest.source.name} with the same sizes, head "
                f"weights and {manifest.normalization} scores. Export the same checkpoint in float32"
            )


def trace(
    pipe: Pipeline,
    inputs: ModelInputs,
    forced_tokens: Sequence[int] = (),
    kept: npt.NDArray[np.bool_] | None = None,
) -> Trace:
    """Run one prompt at the bundle's keep_ratio and keep what every stage made.

    forced_tokens: decoded one after another, then the most probable ones.  kept: bool [num_visual], the visual tokens
    kept; None lets the scores choose.
    """
    selector = "hawk" if kept is None else lambda *_: np.flatnonzero(kept)
    pruning = PruningConfig(keep_ratio=pipe.bundle.manifest.keep_ratio, selector=selector)
    return traced(pipe, inputs, pruning, forced_tokens, STEPS)


def condensed(made: Trace, logit_ids: npt.NDArray[np.int64] | None = None) -> Trace:
    """A trace as a reference keeps it: rows as sketches, and the logits of some tokens.

    logit_ids: of these; None takes the most probable tokens of each step, and some others.
    """
    if logit_ids is None:
        best = np.argsort(-made.logits, 1, kind="stable")[:, :BEST_LOGITS]
        others = np.random.RandomState(_SEED).permutation(made.logits.shape[1])[:_OTHER_LOGITS]
        logit_ids = np.unique(np.concatenate([best.ravel(), others])).astype(np.int64)
    finite = np.isfinite(made.logits).all(1, keepdims=True)  # of the tokens that are left out too
    return replace(
        made,
        visual_embeds=_sketch(made.visual_embeds),
        hidden_states=_sketch(made.hidden_states),
        logits=np.where(finite, made.logits[:, logit_ids], np.float32(np.nan)),
        logit_ids=logit_ids,
    )


def tensor_prompts(manifest: Manifest, seed: int = _SEED) -> dict[str, ModelInputs]:
    """Prompts of images, text and, where the family takes it, video: noise and text tokens between special ones."""
    rng = np.random.default_rng(seed)
    shown: dict[str, tuple[list[tuple[int, int]], int]] = {
        "image 224x224": ([(224, 224)], 0),
        "image 336x140": ([(336, 140)], 0),
        "two images": ([(168, 112), (112, 168)], 0),
        "text only": ([], 0),
    }
    if manifest.special_tokens.video is not None:
        shown["video of 6 frames"] = ([], 6)
    return {name: random_inputs(manifest, rng, sizes, frames) for name, (sizes, frames) in shown.items()}


def random_inputs(
    manifest: Manifest,
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]],
    num_frames: int,
    text_tokens: int | None = None,
) -> ModelInputs:
    """A prompt with images of these widths and heights, or with a video of so many frames, amid so many text tokens."""
    family, tokens = load_family(manifest.vision), manifest.special_tokens
    known = (tokens.image, tokens.video, tokens.vision_start, tokens.vision_end, tokens.im_start, tokens.im_end)
    special = [token for token in (*known, tokens.pad, *tokens.eos) if token is not None]
    plain = np.setdiff1d(np.arange(manifest.language.vocab_size), special)

    def text(count: int) -> list[int]:
        drawn: list[int] = rng.choice(plain, count).tolist()
        return drawn

    # A checkpoint without a tokenizer may not know these two, which any token can stand in for.
    start, end = (text(1)[0] if token is None else token for token in (tokens.vision_start, tokens.vision_end))
    filled = replace(tokens, vision_start=start, vision_end=end)
    settings = family.image_settings({})
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    frames = [rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(num_frames)]
    items = [family.images_to_patches([image], settings) for image in images]
    if frames:
        times = [frame / 2 for frame in range(num_frames)]
        items.append(replace(family.video_to_patches(frames, settings), kind="video", times=times))
    opening, closing = ([] if token is None else [token] for token in (tokens.im_start, tokens.im_end))
    others = len(opening) + len(closing) + _TEXT_TOKENS + 3
    ids: list[int] = [*opening, *text(_TEXT_TOKENS)]
    for item in items:
        parts = family.placeholder(item, filled)
        if TokenRun(end) not in parts:  # then the templates have the tokens around an image
            parts = (TokenRun(start), *parts, TokenRun(end))
        for part in parts:
            ids += text(2) if isinstance(part, str) else [part.token_id] * part.count
    ids += text(_TEXT_TOKENS if text_tokens is None else max(text_tokens - others, 1))
    ids += [*closing, *text(3)]
    return family.model_inputs(np.array(ids, dtype=np.int64), items)


def model_of(manifest: Manifest) -> tuple[str, str]:
    """A digest of all that outputs depend on but the weights; and how those are quantised, empty where they are not."""
    told = (
        manifest.family,
        manifest.language,
        manifest.vision,
        manifest.normalization,
        manifest.head_weights.values,
        manifest.keep_ratio,
        manifest.special_tokens,
    )
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest(), "" if manifest.weights is None else manifest.precision


def _sketch(rows: Floats) -> Floats:
    """[rows, n] -> float32 [rows, 64]: products with fixed random directions; [rows, n] itself where n is no more."""
    size = rows.shape[1]
    if size <= _SKETCH_SIZE:
        return rows
    # RandomState's numbers are the same in every version of numpy
    signs = np.random.RandomState(_SEED).randint(0, 2, (size, _SKETCH_SIZE)) * 2.0 - 1.0
    sketch: Floats = (rows.astype(np.float64) @ signs / np.sqrt(_SKETCH_SIZE)).astype(np.float32)
    return sketch
