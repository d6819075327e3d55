"""Multiple choice: which choice a data set's key means, and which one a model's answer names.

A key is strict, since a key that is read wrongly scores every answer wrongly in silence; an answer is free text.
"""

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_KEY_LETTER = re.compile(r"[\[(]?([A-Za-z])[\])]?[.:)]?(?:\s+(.+))?", re.DOTALL)
_ANSWER_LETTER = re.compile(r"\W*(?:(?:the )?(?:answer|option|choice)(?: is)?:?\s*)?\(?([a-z])(?:\W|$)")
_ARTICLE = re.compile(r"(?:an?|the) ")


def plain(text: str) -> str:
    """The text without case, repeated spaces and a full stop at its end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def key_choice(key: str | int | float, choices: tuple[str, ...]) -> int:
    """Index of the choice that a key means: by its index from 0 (a number), its letter, its text, or "B. text".

    ValueError where it means no choice, or more than one.
    """
    text = plain(str(key))
    found = {index for index, choice in enumerate(choices) if plain(choice) == text}
    if isinstance(key, int) and 0 <= key < len(choices):
        found.add(key)
    letter = _KEY_LETTER.fullmatch(str(key).strip())
    if letter:
        index = LETTERS.index(letter[1].upper())
        if index < len(choices) and (letter[2] is None or plain(letter[2]) == plain(choices[index])):
            found.add(index)
    if len(found) != 1:
        last = len(choices) - 1
        several = " and ".join(f"{LETTERS[index]}. {choices[index][:60]}" for index in sorted(found))
        matches = f"could mean {several}" if found else f"matches none of its {len(choices)} choices"
        raise ValueError(
            f"the answer {str(key)[:60]!r} {matches}; expected a letter from A to {LETTERS[last]}, "
            f"an index from 0 to {last} (a number), or the text of one choice"
        )
    return found.pop()


def answered_choice(text: str, choices: tuple[str, ...]) -> int | None:
    """Index of the choice that an answer names: by its letter alone, its words, or the letter that it begins with."""
    words = plain(text)
    if len(words) == 1 and words.isascii() and words.isalpha():
        index = LETTERS.index(words.upper())
        if index < len(choices):
            return index
    known = [plain(choice) for choice in choices]
    if words in known:
        return known.index(words)
    bare = [_ARTICLE.sub("", choice, count=1) if _ARTICLE.match(choice) else choice for choice in known]
    if _ARTICLE.match(words) and (rest := _ARTICLE.sub("", words, count=1)) in bare:  # "a dog" is not the letter A
        return bare.index(rest)
    match = _ANSWER_LETTER.match(words)
    index = LETTERS.index(match[1].upper()) if match else len(choices)
    return index if index < len(choices) else None
