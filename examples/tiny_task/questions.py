"""Questions about a scene, phrased as the model was trained on, with their answers.

colour   What colour is the ring?           purple
what     Which digit is red?                 7
exist    Is there a number 4?                no
where    In which corner is the heart?       bottom left
count    How many circles are there?         3
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .glyphs import GLYPHS, SHAPES
from .scene import Box, Scene, Thing

QUESTION_KINDS = ("colour", "what", "exist", "where", "count")
_CENTRE_MARGIN = 6  # pixels from the middle lines within which no corner is asked for


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one kind, its answer, and the boxes of the things it is about (none where there are none)."""

    kind: str
    text: str
    answer: str
    targets: tuple[Box, ...]


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """Ask a random question of a kind, or None where the scene has nothing to ask about in that way."""
    return _ASK[kind](rng, scene)


def _ask_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    thing = _pick(rng, _single(scene))
    if thing is None:
        return None
    name = _name(rng, thing.glyph)
    text = _choose(
        rng, f"What colour is the {name}?", f"What is the colour of the {name}?", f"Which colour does the {name} have?"
    )
    return Question("colour", text, thing.colour, (thing.box,))


def _ask_what(rng: np.random.Generator, scene: Scene) -> Question | None:
    of_a_sort = Counter((thing.is_digit, thing.colour) for thing in scene.things)
    of_a_colour = Counter(thing.colour for thing in scene.things)
    thing = _pick(rng, [thing for thing in scene.things if of_a_sort[thing.is_digit, thing.colour] == 1])
    if thing is None:
        return None
    sort, colour = "digit" if thing.is_digit else "shape", thing.colour
    phrases = [f"Which {sort} is {colour}?", f"What {sort} is {colour}?", f"Name the {colour} {sort}."]
    if of_a_colour[colour] == 1:
        phrases.append(f"What is {colour}?")
    return Question("what", _choose(rng, *phrases), thing.glyph, (thing.box,))


def _ask_exist(rng: np.random.Generator, scene: Scene) -> Question | None:
    here = {thing.glyph for thing in scene.things}
    absent = [glyph for glyph in GLYPHS if glyph not in here]
    if absent and rng.random() < 0.5:
        glyph = _choose(rng, *absent)
    else:
        glyph = _choose(rng, *(thing.glyph for thing in scene.things))
    name = _name(rng, glyph)
    text = _choose(rng, f"Is there a {name}?", f"Can you see a {name}?", f"Is a {name} in the picture?")
    return Question("exist", text, "yes" if glyph in here else "no", _boxes(scene, glyph))


def _ask_where(rng: np.random.Generator, scene: Scene) -> Question | None:
    middle = scene.size / 2
    thing = _pick(rng, [t for t in _single(scene) if all(abs(at - middle) > _CENTRE_MARGIN for at in t.box.centre)])
    if thing is None:
        return None
    x, y = thing.box.centre
    name = _name(rng, thing.glyph)
    text = _choose(rng, f"Where is the {name}?", f"In which corner is the {name}?")
    answer = f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"
    return Question("where", text, answer, (thing.box,))


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    here = list(dict.fromkeys(thing.glyph for thing in scene.things if not thing.is_digit))
    shape = _choose(rng, *(here if here and rng.random() < 0.85 else SHAPES))
    name = shape + ("es" if shape == "cross" else "s")
    text = _choose(rng, f"How many {name} are there?", f"Count the {name}.")
    targets = _boxes(scene, shape)
    return Question("count", text, str(len(targets)), targets)


_ASK = dict(zip(QUESTION_KINDS, (_ask_colour, _ask_what, _ask_exist, _ask_where, _ask_count), strict=True))


def _single(scene: Scene) -> list[Thing]:
    """The things whose glyph stands in the scene once."""
    count = Counter(thing.glyph for thing in scene.things)
    return [thing for thing in scene.things if count[thing.glyph] == 1]


def _boxes(scene: Scene, glyph: str) -> tuple[Box, ...]:
    return tuple(thing.box for thing in scene.things if thing.glyph == glyph)


def _pick(rng: np.random.Generator, things: list[Thing]) -> Thing | None:
    return things[rng.integers(len(things))] if things else None


def _choose(rng: np.random.Generator, *options: str) -> str:
    return options[rng.integers(len(options))]


def _name(rng: np.random.Generator, glyph: str) -> str:
    """A shape's name; a digit is called digit 7 (half of the time), number 7 or just 7."""
    if not glyph.isdigit():
        return glyph
    if rng.random() < 0.5:
        return f"digit {glyph}"
    return f"number {glyph}" if rng.random() < 0.3 else glyph
