"""What is learnt, in which order: every number of the training but the seed.

First the vision tower learns, with heads that are thrown away, to say of each visual token what stands there. Then
it stays as it is, and the language model learns to answer: first about small pictures, then about larger ones, then
about pictures of which it sees a part. What is hidden is chosen by chance, and questions are about what is left.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of one step.

    Attributes:
        size: height and width in pixels, a multiple of the 112 of a window.
        count: pictures side by side.
        things: fewest and most glyphs in one, both included.
    """

    size: int
    count: int
    things: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps of one kind.

    Attributes:
        name: for the log.
        trains: the vision tower, or the language model with its embeddings.
        steps: in all.
        cycle: what the steps see, in turn.
        straddling: share of the pictures whose glyphs may lie across the cells of 28 pixels.
        hiding: share of the pictures some of whose visual tokens are not seen, glyphs among them.
        learning_rate: at its highest, after WARM_UP steps.
        falling: share of the steps, at the end, in which the learning rate falls to LAST_SHARE of it.
    """

    name: str
    trains: Literal["vision", "language"]
    steps: int
    cycle: tuple[Pictures, ...]
    straddling: float
    hiding: float
    learning_rate: float
    falling: float


WARM_UP = 50
LAST_SHARE = 0.03
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 1.0
QUESTIONS = 12
"""Questions about each picture, hidden from one another."""

# A picture of 112 pixels is one window of the tower, and has 16 visual tokens; 224 has 64, 336 has 144.
_DENSE = (
    Pictures(224, 24, (12, 30)),
    Pictures(112, 64, (3, 12)),
    Pictures(224, 24, (12, 30)),
    Pictures(336, 10, (24, 50)),
)
_SMALL = (Pictures(112, 16, (1, 6)),)
_LARGE = (
    Pictures(224, 16, (8, 18)),
    Pictures(224, 16, (4, 22)),
    Pictures(112, 16, (1, 8)),
    Pictures(224, 16, (8, 18)),
    Pictures(336, 8, (8, 18)),
)

STAGES = (
    Stage("what each token shows", "vision", 700, _DENSE, 0.4, 0.0, 2e-3, 0.4),
    Stage("questions, 112 px", "language", 300, _SMALL, 0.2, 0.0, 2e-3, 0.0),
    Stage("questions, to 336 px", "language", 500, _LARGE, 0.3, 0.0, 2e-3, 0.0),
    Stage("questions, tokens hidden", "language", 700, _LARGE, 0.3, 0.4, 2e-3, 0.8),
)
