"""Ten inputs and outputs made with the HAWK authors' code, in float32, on a small random Qwen2.5-VL.

tests/data/golden/README.md says what each array is and how exactly it must be met.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parent / "data" / "golden"
MODEL = ROOT / "model_a" / "hf"
IM_END, VISION_END, IMAGE, VIDEO, PAD = 501, 503, 505, 506, 499
CASES = tuple(sorted(path.name for path in (ROOT / "cases").iterdir()))

SCORE_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """One case.

    inputs: input_ids and attention_mask [1, seq_len], pixel_values float32 [num_patches, 1176] and image_grid_thw,
        or the same of a video, with second_per_grid_ts; nothing visual in a prompt of text only.
    expected: see tests/data/golden/README.md.
    """

    name: str
    keep_ratio: float
    head_weights: tuple[float, ...]
    normalization: str
    min_visual_tokens: int
    num_visual: int
    num_kept: int
    inputs: dict[str, npt.NDArray[Any]]
    expected: dict[str, npt.NDArray[Any]]

    @property
    def kept_indices(self) -> npt.NDArray[np.int64]:
        """What our kept_indices must be: the authors' keep_indices without padding."""
        kept = self.expected["keep_indices"].astype(np.int64)
        return kept[self.inputs["attention_mask"][0, kept] == 1]

    @property
    def mm_token_type_ids(self) -> npt.NDArray[np.int32]:
        """What transformers 5 needs for mRoPE: 0 text, 1 image, 2 video; int32 [1, seq_len]."""
        ids = self.inputs["input_ids"]
        return (ids == IMAGE).astype(np.int32) + 2 * (ids == VIDEO).astype(np.int32)


def load_case(name: str) -> GoldenCase:
    folder = ROOT / "cases" / name
    meta = json.loads((folder / "meta.json").read_text())
    inputs = _arrays(folder / "inputs.npz")
    for pixels in ("pixel_values", "pixel_values_videos"):
        if pixels in inputs:  # stored as float16, which holds them exactly
            inputs[pixels] = inputs[pixels].astype(np.float32)
    return GoldenCase(
        name=name,
        keep_ratio=meta["keep_ratio"],
        head_weights=tuple(meta["head_weights"]),
        normalization=meta["score_normalization"],
        min_visual_tokens=meta["min_visual_tokens"],
        num_visual=meta["n_visual"],
        num_kept=meta["k_visual"],
        inputs=inputs,
        expected=_arrays(folder / "expected.npz"),
    )


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)
