"""Samples: a scene and one question about it, in any number and the same for the same seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput

from .questions import QUESTION_KINDS, ask
from .scene import CELL, Box, draw_scene, max_things


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one picture.

    Attributes:
        image: uint8 [size, size, 3], RGB.
        question: the prompt.
        answer: what the model was trained to say, word for word.
        kind: one of QUESTION_KINDS.
        targets: boxes of what the question is about; none where the answer is that there is none.
    """

    image: npt.NDArray[np.uint8]
    question: str
    answer: str
    kind: str
    targets: tuple[Box, ...]


def generate(
    seed: int,
    count: int,
    *,
    size: int = 224,
    objects: tuple[int, int] = (10, 16),
    aligned: bool = True,
    kinds: Sequence[str] = QUESTION_KINDS,
) -> Iterator[Sample]:
    """Make samples, the kinds of question in turn.

    Sample i depends on seed, i and the settings alone, so a larger count only adds to a smaller one.

    Args:
        seed: at least 0.
        count: of samples.
        size: height and width of the pictures in pixels, a multiple of 28.
        objects: fewest and most glyphs in a scene, both included.
        aligned: whether glyphs stay inside the cells of 28 pixels.
        kinds: of question.

    Raises:
        InvalidInput: a setting that no scene can have.
    """
    fewest, most = objects
    if seed < 0 or count < 0:
        raise InvalidInput(f"seed, count: got {seed}, {count}, expected integers of at least 0")
    if size < 2 * CELL or size % CELL:
        raise InvalidInput(f"size: got {size}, expected a multiple of {CELL} of at least {2 * CELL}")
    if not 1 <= fewest <= most <= max_things(size):
        raise InvalidInput(f"objects: got {fewest} to {most}, expected 1 to {max_things(size)} at size {size}")
    if not kinds or not set(kinds) <= set(QUESTION_KINDS):
        raise InvalidInput(f"kinds: got {', '.join(kinds)!r}, expected some of {', '.join(QUESTION_KINDS)}")
    return (
        _sample(np.random.default_rng([seed, i]), size, objects, kinds[i % len(kinds)], aligned=aligned)
        for i in range(count)
    )


def _sample(rng: np.random.Generator, size: int, objects: tuple[int, int], kind: str, *, aligned: bool) -> Sample:
    while True:  # nearly every scene allows every kind of question; one that does not is drawn again
        scene = draw_scene(rng, size, int(rng.integers(objects[0], objects[1] + 1)), aligned=aligned)
        question = ask(rng, scene, kind)
        if question is not None:
            return Sample(scene.image, question.text, question.answer, question.kind, question.targets)
