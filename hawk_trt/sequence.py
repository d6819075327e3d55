"""Sequence: one answer on its way, from the prompt's layout to the result.

In: a request, laid out, and the token of each step. Out: text pieces that are safe to show, then the result. A piece
never holds half a character and never the beginning of a stop string; all pieces together are the text.
"""

import time
from collections import abc
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs.layout import PromptLayout
from hawk_trt.request import ModelInputs, PruningConfig, Request, Result, Timings, TokenLogprobs
from hawk_trt.runtime.protocol import Row


@dataclass(eq=False, repr=False)
class Sequence:
    """One prompt and its answer so far."""

    request: Request
    inputs: ModelInputs
    pruning: PruningConfig
    layout: PromptLayout
    head_weights: npt.NDArray[np.float32]
    max_kept: int  # tokens that the prompt keeps at most, text and visual; keep_mass may keep fewer
    limit: int  # most tokens that the answer can have
    tokenizer: Tokenizer | None  # None where the bundle has none; then InvalidInput where the request has stop strings
    eos: abc.Collection[int]  # stop tokens, unless the request ignores them
    # draws a token by the logits, float32 [vocab]; None takes the most probable one
    sampler: abc.Callable[[npt.NDArray[np.float32]], int] | None = None
    need_logits: bool = field(init=False)  # whether its decode steps must bring logits to the host
    row: Row | None = None  # its place in a KV cache while it runs
    scores: npt.NDArray[np.float32] = field(init=False)  # float32 [num_visual], from the prefill on
    kept: npt.NDArray[np.int64] = field(init=False)  # int64 [kept], positions kept in the layout, from the prefill on
    num_cached: int = 0  # images and videos that the vision stage did not run for
    timings: Timings = field(default_factory=Timings)
    started: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)  # tokens generated, the stop token included
    piece: str = ""  # text that the last step completed, often none
    # of the tokens that the piece completed, where asked for
    piece_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # "stop" after a stop token or stop string, "length" at the limit, None before
    finish_reason: Literal["stop", "length"] | None = None
    error: Exception | None = None  # why it ended without an answer
    dropped: bool = False  # whether nobody waits for it any more; the scheduler lets it go before its next step

    def __post_init__(self) -> None:
        if self.request.stop and self.tokenizer is None:
            raise InvalidInput(
                "stop: stop strings need a tokenizer and this bundle has none. "
                "Export a checkpoint folder with a tokenizer.json, or end the answer by max_new_tokens"
            )
        self._decoder = DecodeStream(skip_special_tokens=self.request.skip_special_tokens)
        self._eos = frozenset(() if self.request.ignore_eos else self.eos)
        self._pieces: list[str] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._logits: list[npt.NDArray[np.float32]] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_shown = 0  # tokens that the pieces so far completed

    @property
    def finished(self) -> bool:
        """Whether it needs no more steps."""
        return self.finish_reason is not None or self.error is not None or self.dropped

    @property
    def position(self) -> int:
        """Position of the last token generated, which the next step runs over."""
        return self.layout.next_position + len(self.token_ids) - 1

    @property
    def columns(self) -> int:
        """Columns of the KV cache written so far: the last token is not cached yet."""
        return len(self.kept) + len(self.token_ids) - 1

    @property
    def max_columns(self) -> int:
        """Columns of the KV cache that the longest answer takes."""
        return self.max_kept + self.limit - 1

    @property
    def text(self) -> str | None:
        """All pieces so far, None without a tokenizer."""
        return None if self.tokenizer is None else "".join(self._pieces)

    def step(self, next_token: int, logits: npt.NDArray[np.float32] | None) -> None:
        """Take what a step brought: choose a token, add its text, end where it ends the answer.

        next_token is the most probable one, logits are float32 [vocab], None where the step brought none. Raises
        BackendError where no number among them can be used.
        """
        if logits is not None:
            next_token = (self.sampler or most_probable)(logits)
            if self.request.return_logits:
                self._logits.append(logits.copy())
            if self.request.logprobs is not None:
                self._logprobs.append(_logprobs(logits, next_token, self.request.logprobs))
        self.token_ids.append(next_token)
        if next_token in self._eos:
            self.piece = self._end("stop")
        elif self.tokenizer is not None:
            self._held += self._decoder.step(self.tokenizer, next_token) or ""
            self.piece = self._release()
        if self.finish_reason is None and len(self.token_ids) >= self.limit:
            self.piece += self._end("length")
        if self.piece:
            shown = len(self.token_ids) - (next_token in self._eos)
            self.piece_logprobs = self._logprobs[self._num_shown : shown]
            self._num_shown = shown
        if self.finish_reason is not None:
            self.timings.total = time.perf_counter() - self.started

    def result(self) -> Result:
        """The answer, as far as it goes."""
        return Result(
            text=self.text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason or "length",
            num_visual=self.layout.num_visual,
            num_kept=int(np.count_nonzero(self.layout.visual_rows[self.kept] >= 0)),
            kept_indices=self.layout.source_index[self.kept],
            scores=self.scores,
            timings=self.timings,
            num_cached=self.num_cached,
            query=self.layout.query,
            logprobs=None if self.request.logprobs is None else list(self._logprobs),
            logits=np.stack(self._logits) if self.request.return_logits else None,
        )

    def _end(self, reason: Literal["stop", "length"]) -> str:
        """End the answer; the text held back, unfinished characters included."""
        if self.tokenizer is not None:
            tokens = self.token_ids[:-1] if reason == "stop" else self.token_ids
            decoded = sum(map(len, self._pieces)) + len(self._held)
            self._held += self.tokenizer.decode(tokens, self.request.skip_special_tokens)[decoded:]
        shown = self._release()
        if self.finish_reason is None:  # no stop string within the last characters
            self.finish_reason = reason
            self._pieces.append(self._held)
            shown += self._held
        return shown

    def _release(self) -> str:
        """Take out of the held text what can be shown; end the answer at a stop string."""
        stops = self.request.stop
        ends = [(self._held.find(stop) + len(stop), len(stop)) for stop in stops if stop in self._held]
        if ends:
            # By completion, so that the text does not depend on how it was cut into tokens.
            end, length = min(ends, key=lambda found: (found[0], -found[1]))
            self.finish_reason = "stop"
            shown, self._held = self._held[: end - length], ""
        else:
            hold = max((_overlap(self._held, stop) for stop in stops), default=0)
            shown, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        self._pieces.append(shown)
        return shown


def _logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """The log probability of a token and of the most probable ones."""
    values = log_softmax(logits)
    best = np.argpartition(-values, min(count, values.size - 1))[:count]
    best = best[np.lexsort((best, -values[best]))]
    return TokenLogprobs(token, float(values[token]), tuple((int(i), float(values[i])) for i in best))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is the beginning of stop, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def most_probable(logits: npt.NDArray[np.float32]) -> int:
    """The token of the largest of [vocab] logits, the lower index on a tie; -inf is never.

    Raises BackendError: NaN, +inf, or -inf alone.
    """
    best = int(np.argmax(logits))  # NaN and +inf win here, so this one value tells whether all can be used
    if not np.isfinite(logits[best]):
        nan, infinite = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
        found = f"{nan} NaN and {infinite} +inf" if nan or infinite else "only -inf"
        raise BackendError(f"the decoder produced non-finite logits: {found} among {logits.size} values")
    return best


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Log probabilities of [vocab] logits, float32."""
    shifted = logits.astype(np.float64) - logits.max()
    values: npt.NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return values
