"""Row: one answer on its way, from the prompt's layout to the result, wherever its steps are run."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.answer import Answer
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.pruning.selection import asked_by, head_weights, kept_count
from hawk_trt.request import ModelInputs, PruningConfig, Result, SamplingConfig, Timings
from hawk_trt.runtime.protocol import DecodeInputs, StepOutputs
from hawk_trt.sampling import Sampler

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

IntArray = npt.NDArray[np.int64]


class Row:
    """One prompt and its answer so far.

    Attributes:
        inputs: the prompt.
        pruning: how it is pruned.
        layout: where everything of it lies.
        head_weights: float32 [heads], for its scores.
        limit: most tokens that the answer can have.
        kept_total: tokens that the prompt keeps, text and visual; with keep_mass at most.
        need_logits: whether its steps must bring logits to the host.
        scores: float32 [num_visual], after the prefill.
        kept: int64 [kept], positions kept in the layout, after the prefill.
        num_cached: images and videos that the vision stage did not run for, after the prefill.
        timings: seconds so far.
    """

    scores: npt.NDArray[np.float32]
    kept: IntArray

    def __init__(
        self,
        pipe: "Pipeline",
        inputs: ModelInputs,
        pruning: PruningConfig | None,
        max_new_tokens: int,
        sampling: SamplingConfig | None,
        stop: Sequence[str],
        ignore_eos: bool,
        return_logits: bool,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
        manifest = pipe.bundle.manifest
        sampling = sampling or SamplingConfig()
        self.inputs = inputs
        self.pruning = pruning or PruningConfig()
        self.head_weights = head_weights(pipe.bundle, self.pruning)
        self.layout = asked_by(pipe.layout(inputs, self.pruning.query), self.pruning)
        self.limit = min(max_new_tokens, manifest.language.max_position_embeddings - self.layout.next_position)
        # the CPU has the logits anyway, and the sampler tells a broken run from an answer
        self.need_logits = return_logits or not sampling.greedy or pipe.backend.device == "cpu"
        self.kept_total = self.layout.num_tokens - self.layout.num_visual + kept_count(self.layout, self.pruning)
        self.num_cached = 0
        self.timings = Timings()
        self._answer = Answer(pipe.chat_tokenizer(), () if ignore_eos else manifest.special_tokens.eos, stop)
        self._sampler = Sampler(sampling)
        self._return_logits = return_logits
        self._logits: list[npt.NDArray[np.float32]] = []

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated."""
        return self._answer.token_ids

    @property
    def finished(self) -> bool:
        """Whether it needs no more tokens."""
        return self._answer.finished or len(self.token_ids) >= self.limit

    @property
    def position(self) -> int:
        """Position of the last token generated, which the next step runs over."""
        return self.layout.next_position + len(self.token_ids) - 1

    def take(self, outputs: StepOutputs, number: int, where: Callable[[int], str]) -> str:
        """Add the token that a step brought.

        Args:
            outputs: of the step.
            number: of this row in it.
            where: says of a row's number what first went wrong, where its logits cannot be used.

        Returns:
            The text that can be shown now, often none.

        Raises:
            BackendError: no number among the logits can be used.
        """
        token = int(outputs.next_token[number])
        if outputs.logits is not None:
            logits = outputs.logits[number]
            try:
                token = self._sampler.next_token(logits)
            except BackendError as error:
                raise BackendError(f"{error}. {where(number)}") from error
            if self._return_logits:
                self._logits.append(logits.copy())
        return self._answer.push(token)

    def flush(self) -> str:
        """End the answer by length, if nothing ended it before; the text held back."""
        return self._answer.flush()

    def result(self) -> Result:
        """The answer as it is now."""
        return Result(
            text=self._answer.text,
            token_ids=list(self.token_ids),
            finish_reason=self._answer.finish_reason or "length",
            num_visual=self.layout.num_visual,
            num_kept=int(np.count_nonzero(self.layout.visual_rows[self.kept] >= 0)),
            kept_indices=self.layout.source_index[self.kept],
            scores=self.scores,
            timings=self.timings,
            num_cached=self.num_cached,
            logits=np.stack(self._logits) if self._return_logits else None,
        )


def next_inputs(rows: Sequence[Row], tokens: IntArray | None = None) -> DecodeInputs:
    """What the next step of these rows runs over.

    Args:
        rows: a row that is finished goes along with its last token.
        tokens: int64 [rows], in place of those that the rows chose.
    """
    if tokens is None:
        tokens = np.array([row.token_ids[-1] for row in rows], np.int64)
    return DecodeInputs(tokens, np.array([row.position for row in rows], np.int64))
