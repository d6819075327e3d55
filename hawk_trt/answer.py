"""One answer as it grows: token ids in, text pieces that are safe to show out.

A piece never holds half a character, and never the beginning of a stop string. All pieces together are the text.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from tokenizers import Tokenizer

from hawk_trt.errors import InvalidInput

# What a decoder writes for bytes that are no character, or not yet one.
_REPLACEMENT = "\ufffd"


class Answer:
    """The tokens and text of one row, and whether it has ended.

    Attributes:
        token_ids: all tokens pushed, the stop token included.
        finish_reason: "stop" after a stop token or stop string, "length" after flush, None before.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos: Collection[int], stop: Sequence[str] = ()) -> None:
        """Start an empty answer.

        Args:
            tokenizer: turns ids into text, special tokens left out; None gives token ids only.
            eos: ids that end the answer; they are not in the text.
            stop: strings that end the answer; the text ends before the one that is complete first.

        Raises:
            InvalidInput: stop is not a list of non-empty strings, or there is no tokenizer to find them with.
        """
        if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
            raise InvalidInput(f"stop: got {stop!r}, expected a list of non-empty strings")
        if stop and tokenizer is None:
            raise InvalidInput(
                "stop: stop strings need a tokenizer and this bundle has none. "
                "Export a checkpoint folder with a tokenizer.json, or end the answer by max_new_tokens"
            )
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        self._stop = tuple(stop)
        self._pieces: list[str] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        # Decoding all ids anew for each token would be quadratic: a window of ids, of whose text the first
        # _seen characters are already taken, gives the same.
        self._window: list[int] = []
        self._seen = 0

    @property
    def finished(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    @property
    def text(self) -> str | None:
        """All pieces so far, None without a tokenizer."""
        return None if self._tokenizer is None else "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that can be shown now, often none."""
        assert not self.finished, "a token after the end of an answer"
        self.token_ids.append(token_id)
        if token_id in self._eos:
            return self._end("stop")
        if self._tokenizer is None:
            return ""
        self._held += self._decode(self._tokenizer, token_id)
        return self._release()

    def flush(self) -> str:
        """End the answer by length, if nothing ended it before, and return the text held back."""
        return "" if self.finished else self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> str:
        if self._tokenizer is not None:
            self._held += self._tokenizer.decode(self._window)[self._seen :]
        shown = self._release()
        if self.finished:  # by a stop string within the last characters
            return shown
        self.finish_reason = reason
        self._pieces.append(self._held)
        return shown + self._held

    def _decode(self, tokenizer: Tokenizer, token_id: int) -> str:
        """The characters that this token completes."""
        self._window.append(token_id)
        text = tokenizer.decode(self._window)
        certain = text.rstrip(_REPLACEMENT)  # later tokens may complete what stands there
        characters = certain[self._seen :]
        self._seen = max(self._seen, len(certain))
        # Where the text ends with a whole character what came before cannot change any more. One token stays, since
        # some decoders drop the space before a first word; one without text of its own would not serve for that.
        if certain == text and (context := tokenizer.decode([token_id])):
            self._window, self._seen = [token_id], len(context)
        return characters

    def _release(self) -> str:
        """Take out of _held what can be shown; end the answer at a stop string."""
        ends = [(self._held.find(stop) + len(stop), len(stop)) for stop in self._stop if stop in self._held]
        if ends:
            # By completion, so that the text does not depend on how it was cut into tokens.
            end, length = min(ends, key=lambda found: (found[0], -found[1]))
            self.finish_reason = "stop"
            shown, self._held = self._held[: end - length], ""
        else:
            hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            shown, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        self._pieces.append(shown)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is the beginning of stop, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
