"""Metrics: how right an answer is, in [0, 1].

exact-match        the words of one of the answers, whatever their case
vqa-accuracy       as many people as gave it, three are enough (Antol et al., 2015)
anls               1 - edit distance / length, 0 from a half on (Biten et al., 2019)
relaxed-accuracy   a number within 5 %, else an exact match (Methani et al., 2020)
multiple-choice    the letter or the text of the right choice

by-sample          multiple-choice where a sample has choices, exact-match where it has none; what counts by default
"""

import re
import string
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from hawk_trt.apps.evaluate.choices import answered_choice, plain
from hawk_trt.apps.evaluate.datasets import Dataset, Sample
from hawk_trt.errors import InvalidInput

Metric = Callable[[str, Sample], float]

_RELATIVE_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5
_PEOPLE_ENOUGH = 3
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, sample: Sample) -> float:
    """1 where the answer is one of the sample's, but for case, spaces and a full stop at the end."""
    return float(plain(answer) in {plain(right) for right in sample.answers})


def vqa_accuracy(answer: str, sample: Sample) -> float:
    """min(1, people who gave it / 3), averaged over leaving out one of them; one answer alone must match.

    Articles and punctuation do not count, and number words are numbers.
    """
    given = _vqa_words(answer)
    people = [_vqa_words(right) for right in sample.answers]
    if len(people) == 1:
        return float(given == people[0])
    agreeing = people.count(given)
    return sum(min(1.0, (agreeing - (person == given)) / _PEOPLE_ENOUGH) for person in people) / len(people)


def anls(answer: str, sample: Sample) -> float:
    """The best over the sample's answers of 1 - distance / longer length; 0 where half or more is wrong."""
    best = max(Levenshtein.normalized_similarity(plain(answer), plain(right)) for right in sample.answers)
    return best if best > _ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, sample: Sample) -> float:
    """1 where a number is within 5 % of one of the answers, or a text equals one."""
    got = _number(answer)
    for right in sample.answers:
        expected = _number(right)
        if got is not None and expected is not None and abs(got - expected) <= _RELATIVE_TOLERANCE * abs(expected):
            return 1.0
    return exact_match(answer, sample)


def multiple_choice(answer: str, sample: Sample) -> float:
    """1 where the letter or the text that the answer gives is the right one's."""
    right = {answered_choice(text, sample.choices) for text in sample.answers}
    chosen = answered_choice(answer, sample.choices)
    return float(chosen is not None and chosen in right)


def by_sample(answer: str, sample: Sample) -> float:
    """multiple_choice of a sample with choices, exact_match of another."""
    return multiple_choice(answer, sample) if sample.choices else exact_match(answer, sample)


METRICS: dict[str, Metric] = {
    "exact-match": exact_match,
    "vqa-accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed-accuracy": relaxed_accuracy,
    "multiple-choice": multiple_choice,
    "by-sample": by_sample,
}


def metric_for(name: str | None, dataset: Dataset) -> str:
    """The metric of a data set; without a name the one that its samples call for.

    Refuses one that would score every answer of some sample as wrong, or half of it.
    """
    if name is None:
        kinds = {"multiple-choice" if sample.choices else "exact-match" for sample in dataset}
        return kinds.pop() if len(kinds) == 1 else "by-sample"
    for sample in dataset:
        if name == "multiple-choice" and not sample.choices:
            raise InvalidInput(f"--metric {name}: sample {sample.id} has no choices. Leave --metric out, or add them")
        if name == "vqa-accuracy" and sample.choices:
            raise InvalidInput(f"--metric {name}: sample {sample.id} has choices and no answers of people")
    return name


def _vqa_words(text: str) -> str:
    # a point or comma between digits belongs to a number
    kept = re.sub(r"(?<=\d)([.,])(?=\d)", lambda match: "\0" if match[0] == "." else "", text.casefold())
    words = kept.translate(_NO_PUNCTUATION).replace("\0", ".").split()
    numbers = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
    return " ".join(numbers.get(word, word) for word in words if word not in _ARTICLES)


def _number(text: str) -> float | None:
    number = plain(text).replace(",", "").removeprefix("$")
    scale = 0.01 if number.endswith("%") else 1.0
    try:
        return float(number.removesuffix("%")) * scale
    except ValueError:
        return None
