"""Keeps special tokens that users spell out apart from those of the chat template, through the template.

Before rendering, an escape character goes before each place in a text where a special token starts, or could start
with what the next text adds; after rendering, the string is cut at the special tokens without one.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise


class Escape:
    """An escape character that no text of a prompt holds, and the special tokens it guards."""

    def __init__(self, special: Collection[str], texts: Iterable[str]) -> None:
        """Choose the character.

        Args:
            special: the special tokens as spelled, none empty.
            texts: all that will be in the rendered string: the prompt's texts and the template.
        """
        used = set().union(*texts, *special)
        # Private use first; a text with a million different characters would be needed to leave none.
        self._character = next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)
        self._special = tuple(special)
        longest_first = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._starts = re.compile(f"(?={longest_first})" if special else "(?!)")
        self._cuts = re.compile(f"{self._character}.|({longest_first or '(?!)'})", re.DOTALL)

    def apply(self, text: str) -> str:
        """The text with its special tokens escaped."""
        starts = {match.start() for match in self._starts.finditer(text)} | self._open_ends(text)
        bounds = [0, *sorted(starts), len(text)]
        return self._character.join(text[begin:end] for begin, end in pairwise(bounds))

    def split(self, rendered: str) -> Iterator[tuple[str, str | None]]:
        """Cut a rendered string.

        Yields:
            A piece of text as the user wrote it, perhaps empty, and the special token after it, None at the end.
        """
        begin = 0
        for match in self._cuts.finditer(rendered):
            if match[1] is not None:
                yield rendered[begin : match.start()].replace(self._character, ""), match[1]
                begin = match.end()
        yield rendered[begin:].replace(self._character, ""), None

    def _open_ends(self, text: str) -> set[int]:
        """Where the text's end, which templates may trim, is the beginning of a special token."""
        end = len(text.rstrip())
        longest = max(map(len, self._special), default=0)
        return {
            start
            for start in range(max(0, end - longest + 1), end)
            if any(token.startswith(text[start:end]) for token in self._special)
        }
