"""Data sets: questions about images or videos, with the answers that count as right.

A data set is "tiny" (the task of the shipped model, made on the fly), "easy-vqa" (9,673 questions about coloured
shapes, of the package easy-vqa), a JSONL file, or a folder that holds samples.jsonl or samples.json. Each line, or each
entry of the JSON list, is one sample; paths are relative to the file:

{"image": "a.png", "question": "What colour is the ring?", "answer": "purple"}
{"id": "7", "images": ["a.png", "b.png"], "question": "Which is older?", "choices": ["the left", "the right"],
 "answer": "B"}
{"video": "a.mp4", "question": "What is said?", "answers": ["hello", "hi"]}

The answer of a sample with choices (or options) is a letter, the index of a choice from 0, or the text of one.
"""

import codecs
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import hawk_trt
from hawk_trt.apps.evaluate.choices import LETTERS, key_choice
from hawk_trt.errors import InvalidInput
from hawk_trt.files import parse_json

if TYPE_CHECKING:
    from hawk_trt.request import ImageInput, VideoInput

TINY, EASY_VQA = "tiny", "easy-vqa"
# Where the generator of the tiny task lies in the wheel, and in the repository.
_TINY_INSTALLED, _TINY_IN_CHECKOUT = "hawk_trt.data.tiny_task", "examples.tiny_task"
_FILES = ("samples.jsonl", "samples.json")
_OTHER_FILES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zip")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question; the images come before it, then the videos."""

    id: str
    question: str
    answers: tuple[str, ...]  # what counts as right; for multiple choice the letter and the text of the right choice
    images: "tuple[ImageInput, ...]" = ()
    videos: "tuple[VideoInput, ...]" = ()
    choices: tuple[str, ...] = ()  # of multiple choice, A first

    @property
    def prompt(self) -> str:
        """The question, with its lettered choices where it has some."""
        if not self.choices:
            return self.question
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *lines, "Answer with the letter of the right choice."])


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples in a fixed order; a smaller count takes the first of a larger one."""

    name: str
    fingerprint: str  # sha256 of what the samples are, whatever their count
    count: int
    make: Callable[[], Iterator[Sample]]  # gives the samples anew
    unknown_keys: tuple[str, ...] = ()  # of the file's samples, which nothing reads

    def __iter__(self) -> Iterator[Sample]:
        return self.make()


def load_dataset(name: str, count: int | None, seed: int) -> Dataset:
    """Open a data set: "tiny", "easy-vqa", a JSONL file or a folder, whose samples and images must all be right.

    count: samples taken; None takes all there are, and 100 of the tiny task. seed: of the tiny task's samples, or of
    the order in which a file's are taken.
    """
    if seed < 0 or (count is not None and count < 1):
        raise InvalidInput(f"count, seed: got {count}, {seed}, expected at least 1 sample and a seed of at least 0")
    if name == TINY:
        return _tiny(100 if count is None else count, seed)
    if name == EASY_VQA:
        return _easy_vqa(count, seed)
    return _from_file(name, count, seed)


def _tiny(count: int, seed: int) -> Dataset:
    root = Path(hawk_trt.__file__).parent.parent
    installed = root.joinpath(*_TINY_INSTALLED.split(".")).is_dir()
    if not installed and str(root) not in sys.path:  # the console script does not put the checkout there
        sys.path.append(str(root))
    generate = import_module(_TINY_INSTALLED if installed else _TINY_IN_CHECKOUT).generate

    def make() -> Iterator[Sample]:
        for number, made in enumerate(generate(seed, count)):
            yield Sample(str(number), made.question, (made.answer,), images=(made.image,))

    digest = hashlib.sha256(f"{TINY} {seed}".encode())
    for made in generate(seed, 5):  # enough to notice another generator: one question of each kind
        digest.update(made.image.tobytes() + f"{made.question}\n{made.answer}\n".encode())
    return Dataset(TINY, digest.hexdigest(), count, make)


def _easy_vqa(count: int | None, seed: int) -> Dataset:
    """Questions of the test set of easy-VQA (Zhou, 2020) about coloured shapes, in an order of the seed's."""
    try:
        from easy_vqa import get_test_image_paths, get_test_questions
    except ImportError as error:
        raise InvalidInput(
            f"dataset {EASY_VQA}: its questions and pictures are a package: pip install easy-vqa"
        ) from error
    questions, answers, images = get_test_questions()
    paths = get_test_image_paths()
    order = np.random.default_rng(seed).permutation(len(questions))[:count].tolist()
    chosen = [Sample(str(n), questions[n], (answers[n],), images=(paths[images[n]],)) for n in order]
    content = "\n".join([f"{EASY_VQA} {seed}", *questions, *answers, *map(str, images)])
    return Dataset(EASY_VQA, hashlib.sha256(content.encode()).hexdigest(), len(chosen), lambda: iter(chosen))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One sample as written; of each pair one name is given."""

    question: str
    id: str | int | None = None
    image: str | None = None
    images: tuple[str, ...] = ()
    video: str | None = None
    videos: tuple[str, ...] = ()
    answer: str | int | float | None = None
    answers: tuple[str | int | float, ...] = ()
    choices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_KEYS = {field.name for field in fields(_Entry)}


def _from_file(name: str, count: int | None, seed: int) -> Dataset:
    path = Path(name)
    if path.is_dir():
        path = next((path / file for file in _FILES if (path / file).is_file()), path)
    if path.is_dir():
        raise InvalidInput(f"dataset {path}: this folder holds no {' or '.join(_FILES)}")
    if not path.is_file() or path.suffix.lower() in _OTHER_FILES:
        raise InvalidInput(
            f"dataset: got {name!r:.200}, expected {TINY}, {EASY_VQA}, a JSONL file or a folder with {_FILES[0]}"
        )
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    advice = 'No samples: expected {"image": ..., "question": ..., "answer": ...} a line, in a .json a list of them'
    if path.suffix == ".json":
        written = parse_json(content, list[dict[str, Any]], str(path), InvalidInput, advice)
    else:
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        written = [
            parse_json(line, dict[str, Any], f"{path}, line {number}", InvalidInput, advice) for number, line in lines
        ]
    samples = [_sample(path, number, values, advice) for number, values in enumerate(written)]
    [(most, times)] = Counter(sample.id for sample in samples).most_common(1) or [("", 0)]
    if times != 1:
        raise InvalidInput(
            f"{path}: "
            + (f"{times} samples have the id {most!r:.60}, expected each id once" if times else "it holds no sample")
        )
    chosen = [samples[place] for place in np.random.default_rng(seed).permutation(len(samples))[:count]]
    for sample in chosen:
        for file in (*sample.images, *sample.videos):
            if not Path(str(file)).is_file():
                raise InvalidInput(f"{path}: sample {sample.id:.60}: {str(file)[:200]}: no such file")
    digest = hashlib.sha256(content + f" {seed}".encode())
    unknown = tuple(sorted({key for values in written for key in values} - _KEYS))
    return Dataset(name, digest.hexdigest(), len(chosen), lambda: iter(chosen), unknown)


def _sample(path: Path, number: int, values: dict[str, Any], advice: str) -> Sample:
    try:
        entry = msgspec.convert({key: value for key, value in values.items() if value is not None}, _Entry)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{path}: sample {number}: {error}. {advice}") from error
    choices = entry.choices or entry.options
    keys = [key for key in (entry.answer, *entry.answers) if key is not None and (choices or str(key).strip())]
    if not keys or not entry.question.strip():
        missing, unknown = "question" if keys else "answer", ", ".join(key[:40] for key in values if key not in _KEYS)
        unknown = f"; unknown keys: {unknown}" if unknown else ""
        raise InvalidInput(f"{path}: sample {number} has no {missing}{unknown}")
    if entry.choices and entry.options:
        raise InvalidInput(f"{path}: sample {number} has both choices and options; give one of them")
    if not choices and {"A", "B"} <= values.keys():
        raise InvalidInput(f"{path}: sample {number} has its choices as A, B, ..., expected choices: a list of them")
    if len(choices) > len(LETTERS):
        raise InvalidInput(f"{path}: sample {number} has {len(choices)} choices, expected at most {len(LETTERS)}")
    answers = [str(key) for key in keys]
    if choices:
        try:
            right = dict.fromkeys(key_choice(key, choices) for key in keys)
        except ValueError as error:
            raise InvalidInput(f"{path}: sample {number}: {error}") from error
        answers = [LETTERS[index] for index in right]
        texts = (choices[index] for index in right)
        answers += [text for text in texts if text.strip().upper() not in LETTERS]  # as another choice's letter is

    def places(one: str | None, several: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(path.parent / file) for file in ((one,) if one is not None else ()) + several)

    return Sample(
        id=str(number if entry.id is None else entry.id),
        question=entry.question,
        answers=tuple(answers),
        images=places(entry.image, entry.images),
        videos=places(entry.video, entry.videos),
        choices=choices,
    )
