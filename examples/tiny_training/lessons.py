"""The pictures, labels and questions of a step, as tensors; the same for the same seed, stage and step.

Each picture has several questions, packed behind it in one row, so that what it costs to read is paid once:

    system, user, <|vision_start|> | visual tokens | <|vision_end|> question, answer | <|vision_end|> question, ...
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.tiny_task import QUESTION_KINDS, Question, Sample, Scene
from examples.tiny_task.glyphs import COLOURS, GLYPHS
from examples.tiny_task.questions import ask
from examples.tiny_task.scene import CELL, draw_scene
from examples.tiny_training.recipe import QUESTIONS, Pictures
from export.architectures import read_config
from hawk_trt.models import load_family

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
ASK, REPLY, END = "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
NO_LABEL = -100
# Questions of a kind that a picture is asked for when their answers are to be balanced.
_TRIES = 24


@dataclass(frozen=True, slots=True)
class Patches:
    """Pictures as the vision tower takes them.

    Attributes:
        pixel_values: float32 [num_patches, patch_dim].
        grid_thw: int64 [pictures, 3].
    """

    pixel_values: Tensor
    grid_thw: Tensor


@dataclass(frozen=True, slots=True)
class CellLabels:
    """What stands in the cell of each visual token, int64 [pictures, num_visual] each.

    Attributes:
        glyph: its place in GLYPHS plus one, 0 for none (junk too).
        colour: its place in COLOURS plus one, 0 for none.
        quarter: of the picture: top left, top right, bottom left, bottom right.
    """

    glyph: Tensor
    colour: Tensor
    quarter: Tensor


@dataclass(frozen=True, slots=True)
class PackedQuestions:
    """Questions and answers behind their pictures.

    Attributes:
        before: int64 [num_before], ids ahead of the visual tokens.
        input_ids: int64 [pictures, QUESTIONS, segment], padded at the end.
        seen: bool [pictures, num_visual], the visual tokens that may be looked at.
        labels: int64 of that shape: the id that must come next where that is part of an answer, else NO_LABEL.
        kinds: int64 [pictures, QUESTIONS], places in QUESTION_KINDS.
    """

    before: Tensor
    seen: Tensor
    input_ids: Tensor
    labels: Tensor
    kinds: Tensor


class Teacher:
    """Makes lessons with the tokenizer and the image settings of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self._family = load_family(read_config(config).vision)
        self._settings = self._family.image_settings(json.loads((folder / "preprocessor_config.json").read_text()))
        self._pad = int(self._tokenizer.encode("<|endoftext|>").ids[0])
        self._before = torch.tensor(self._ids(BEFORE))

    def cells(self, rng: np.random.Generator, pictures: Pictures, straddling: float) -> tuple[Patches, CellLabels]:
        """Pictures and what each of their cells shows."""
        scenes = _scenes(rng, pictures, straddling)
        side = pictures.size // CELL
        glyph = np.zeros((len(scenes), side, side), np.int64)
        colour = np.zeros_like(glyph)
        colours = tuple(COLOURS)
        for i, scene in enumerate(scenes):
            for thing in scene.things:
                x, y = thing.box.centre
                at = i, int(y) // CELL, int(x) // CELL
                glyph[at] = 1 + GLYPHS.index(thing.glyph)
                colour[at] = 1 + colours.index(thing.colour)
        half = np.arange(side) * 2 // side
        quarter = np.broadcast_to(2 * half[:, None] + half, glyph.shape)
        labels = (torch.from_numpy(values.reshape(len(scenes), -1).copy()) for values in (glyph, colour, quarter))
        return self._patches(scenes), CellLabels(*labels)

    def questions(
        self, rng: np.random.Generator, pictures: Pictures, straddling: float, hiding: float = 0.0
    ) -> tuple[Patches, PackedQuestions]:
        """Pictures and questions about what is seen of them; the kinds and, of those that count, the answers alike."""
        scenes = _scenes(rng, pictures, straddling)
        patches = self._patches(scenes)
        seen = np.ones((len(scenes), (pictures.size // CELL) ** 2), np.bool_)
        for i, scene in enumerate(scenes):
            if hiding and rng.random() < hiding:
                scenes[i], seen[i] = hide(rng, scene)
        asked = [[_question(rng, scene, kind) for kind in _kinds(rng)] for scene in scenes]
        return patches, self._packed(asked, torch.from_numpy(seen))

    def alone(self, samples: Sequence[Sample]) -> tuple[Patches, PackedQuestions]:
        """Pictures of one size, each with its own question."""
        seen = torch.ones(len(samples), (samples[0].image.shape[0] // CELL) ** 2, dtype=torch.bool)
        return self._patches(samples), self._packed([[sample] for sample in samples], seen)

    def _packed(self, asked: Sequence[Sequence[Question | Sample]], seen: Tensor) -> PackedQuestions:
        packed = [[self._pack(question) for question in row] for row in asked]
        longest = max(len(ids) for row in packed for ids, _ in row)
        input_ids = torch.full((len(packed), len(packed[0]), longest), self._pad)
        labels = torch.full_like(input_ids, NO_LABEL)
        for i, row in enumerate(packed):
            for j, (ids, answer) in enumerate(row):
                input_ids[i, j, : len(ids)] = torch.tensor(ids)
                labels[i, j, len(ids) - 1 - len(answer) : len(ids) - 1] = torch.tensor(answer)
        kinds = torch.tensor([[QUESTION_KINDS.index(question.kind) for question in row] for row in asked])
        return PackedQuestions(self._before, seen, input_ids, labels, kinds)

    def _pack(self, asked: Question | Sample) -> tuple[list[int], list[int]]:
        """Ids of a question with its answer, and of the answer."""
        text = asked.text if isinstance(asked, Question) else asked.question
        answer = self._ids(asked.answer + END)
        return self._ids(ASK + text + REPLY) + answer, answer

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _patches(self, scenes: Sequence[Scene | Sample]) -> Patches:
        made = self._family.images_to_patches([scene.image for scene in scenes], self._settings)
        return Patches(torch.from_numpy(np.asarray(made.pixel_values)), torch.from_numpy(made.grid_thw))


def _scenes(rng: np.random.Generator, pictures: Pictures, straddling: float) -> list[Scene]:
    fewest, most = pictures.things
    return [
        draw_scene(rng, pictures.size, int(rng.integers(fewest, most + 1)), aligned=bool(rng.random() >= straddling))
        for _ in range(pictures.count)
    ]


def hide(rng: np.random.Generator, scene: Scene) -> tuple[Scene, npt.NDArray[np.bool_]]:
    """Hide the cells of some things and of some background.

    Args:
        rng: decides which; at least one thing is left.
        scene: what is there.

    Returns:
        What is left of it, on the whole picture, and what is seen: bool [cells], row by row.
    """
    side = scene.size // CELL
    seen = rng.random(side * side) < rng.random()
    chosen = rng.permutation(len(scene.things))[: rng.integers(1, len(scene.things) + 1)]
    for number, thing in enumerate(scene.things):
        x, y = thing.box.centre
        seen[int(y) // CELL * side + int(x) // CELL] = number in chosen
    return Scene(scene.image, tuple(scene.things[number] for number in chosen)), seen


def _kinds(rng: np.random.Generator) -> list[str]:
    """Of the questions about one picture: each kind as often as the others, the remainder by chance."""
    rounds = [
        QUESTION_KINDS[i]
        for _ in range(-(-QUESTIONS // len(QUESTION_KINDS)))
        for i in rng.permutation(len(QUESTION_KINDS))
    ]
    return rounds[:QUESTIONS]


def _question(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """A question of that kind, or of another where the scene has nothing to ask about in that way.

    Most shapes stand in a scene once or not at all, so of several counting questions one is taken whose answer,
    not whose shape, is drawn by chance.
    """
    if kind == "count":
        by_answer = defaultdict(list)
        for _ in range(_TRIES):
            if (question := ask(rng, scene, kind)) is not None:
                by_answer[question.answer].append(question)
        return by_answer[sorted(by_answer)[rng.integers(len(by_answer))]][0]
    found = ask(rng, scene, kind)
    return found if found is not None else _question(rng, scene, "count")
