"""What a selector is given: one pool of visual tokens, everything about them read only when asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float32Array: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Visual tokens that compete: all of a prompt, or those of one image or frame.

    Attributes:
        members: int64 [n], their places among the prompt's visual tokens.
        rng: seeded by PruningConfig.seed; one for all pools of a prompt.
        read_scores: gives float32 [num_visual] of the whole prompt.
        read_visual: gives float32 [num_visual, hidden] of the whole prompt.
        read_text: gives float32 [num_text, hidden].
    """

    members: IntArray
    rng: np.random.Generator
    read_scores: Callable[[], Float32Array]
    read_visual: Callable[[], Float32Array]
    read_text: Callable[[], Float32Array]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.members)

    @property
    def scores(self) -> Float32Array:
        """HAWK's scores, float32 [n]. The first read runs the first layer once more, over one kept token."""
        return self.read_scores()[self.members]

    @property
    def visual_embeds(self) -> Float32Array:
        """The vision stage's output, float32 [n, hidden]. The first read copies it from the device."""
        return self.read_visual()[self.members]

    @property
    def text_embeds(self) -> Float32Array:
        """Input embeddings of the instruction, which are those of the query tokens: float32 [num_text, hidden]."""
        return self.read_text()


Selector: TypeAlias = Callable[[Candidates, int], IntArray]
"""Chooses k of the candidates: int64 [k], each in [0, n), without repetition, in any order."""
