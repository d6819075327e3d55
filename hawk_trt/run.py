"""Run: one batch of prompts on its way through the stages, from layouts to results."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.answer import Answer
from hawk_trt.backends import DecodeInputs, PrefillOutputs, StepOutputs
from hawk_trt.config import PruningConfig, SamplingConfig
from hawk_trt.diagnosis import first_not_finite
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.layout import PrefillInputs, collate
from hawk_trt.requests import ModelInputs, Result, Timings
from hawk_trt.sampling import Sampler
from hawk_trt.selection import Source, asked_by, choose, graph_chooses, head_weights, kept_count

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

IntArray = npt.NDArray[np.int64]


class Run:
    """The state of one batch.

    Attributes:
        layouts: of the rows.
        visual: visual embeddings of all rows, after prefill.
        generation: the backend's KV cache, after prefill.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        rows: Sequence[ModelInputs],
        pruning: PruningConfig | None,
        max_new_tokens: int,
        sampling: SamplingConfig | None,
        stop: Sequence[str],
        ignore_eos: bool,
        return_logits: bool,
        started: float,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
        manifest = pipe.bundle.manifest
        self._pipe = pipe
        self._rows = rows
        self._pruning = pruning or PruningConfig()
        sampling = sampling or SamplingConfig()
        self._head_weights = head_weights(pipe.bundle, self._pruning)
        self.layouts = [asked_by(pipe.layout(row, self._pruning.query), self._pruning) for row in rows]
        context = manifest.language.max_position_embeddings
        self._limits = [min(max_new_tokens, context - layout.next_position) for layout in self.layouts]
        tokenizer = pipe.chat_tokenizer()
        eos = () if ignore_eos else manifest.special_tokens.eos
        self._answers = [Answer(tokenizer, eos, stop) for _ in rows]
        self._samplers = [Sampler(sampling) for _ in rows]
        # the CPU has the logits anyway, and the sampler tells a broken run from an answer
        self._need_logits = return_logits or not sampling.greedy or pipe.backend.device == "cpu"
        self._return_logits = return_logits
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in rows]
        self._steps_decoded = 0
        self._started = started
        self._timings = Timings(preprocess=time.perf_counter() - started)

    def steps(self) -> Iterator[list[str]]:
        """Prefill, then decode to the end; yields the new text of each row after each step."""
        yield self._push(self.prefill())
        while not all(self._finished(row) for row in range(len(self._rows))):
            yield self._push(self.decode(np.array([tokens[-1] for tokens in self._tokens], np.int64)))
        rest = ["" if answer.finished else answer.flush() for answer in self._answers]
        self._timings.total = time.perf_counter() - self._started
        yield rest

    def prefill(self) -> IntArray:
        """Run the stages over the prompts; returns the token chosen for each row."""
        backend = self._pipe.backend
        begun = time.perf_counter()
        self.visual, self._cached = self._pipe.encode_rows(self._rows, self.layouts)
        encoded = time.perf_counter()
        inputs, scores = self._select()
        if backend.max_context is not None:  # the answer also ends where the cache does; its last token is not cached
            room = max(backend.max_context - inputs.num_kept_total + 1, 1)
            self._limits = [min(limit, room) for limit in self._limits]
        self.generation = backend.start(len(self._rows), inputs.num_kept_total + max(self._limits) - 1)
        prepared = time.perf_counter()
        # the sampler looks at the first logits in any case, and tells a broken run from an answer
        outputs = self.generation.prefill(inputs, self.visual, logits=True)
        self._scores = self._visual_scores(inputs, outputs.scores) if scores is None else scores
        self._kept = self._kept_indices(inputs, outputs)
        self._timings.vision = encoded - begun
        self._timings.first_layer = prepared - encoded - self._timings.select + outputs.first_layer_seconds
        self._timings.decoder = outputs.decoder_seconds
        return self._choose(outputs.step)

    def _select(self) -> tuple[PrefillInputs, list[npt.NDArray[np.float32]] | None]:
        """The prefill's inputs, with the choice where the host makes it, and the scores where that read them."""
        pruning, rows = self._pruning, range(len(self.layouts))
        limits = [kept_count(layout, pruning) for layout in self.layouts]
        inputs = collate(self.layouts, limits, [None] * len(limits), self._head_weights)
        if all(graph_chooses(layout, pruning) for layout in self.layouts):
            return inputs, None
        begun = time.perf_counter()
        source = Source(self._pipe.bundle, self._pipe.backend, self.layouts, inputs, self.visual)
        chosen = [choose(layout, source, row, pruning) for row, layout in enumerate(self.layouts)]
        counts = [int(kept.sum()) for kept in chosen]
        inputs = collate(self.layouts, counts, chosen, self._head_weights)
        scores = [source.scores(row) for row in rows] if source.scored else None
        self._timings.select = time.perf_counter() - begun - source.score_seconds
        return inputs, scores

    def decode(self, tokens: IntArray) -> IntArray:
        """Run one step over the given tokens; returns the token chosen for each row."""
        begun = time.perf_counter()
        positions = np.array([layout.next_position + self._steps_decoded for layout in self.layouts], np.int64)
        outputs = self.generation.decode(DecodeInputs(tokens, positions), logits=self._need_logits)
        self._steps_decoded += 1
        self._timings.decode += time.perf_counter() - begun
        return self._choose(outputs)

    def results(self) -> list[Result]:
        """The result of each row."""
        return [self._result(row) for row in range(len(self._rows))]

    def _result(self, row: int) -> Result:
        layout, answer, kept = self.layouts[row], self._answers[row], self._kept[row]
        return Result(
            text=answer.text,
            token_ids=list(self._tokens[row]),
            finish_reason=answer.finish_reason or "length",
            num_visual=layout.num_visual,
            num_kept=int(np.count_nonzero(layout.visual_rows[kept] >= 0)),
            kept_indices=layout.source_index[kept],
            scores=self._scores[row],
            timings=self._timings,
            num_cached=self._cached[row],
            logits=np.stack(self._logits[row]) if self._return_logits else None,
        )

    def _finished(self, row: int) -> bool:
        return self._answers[row].finished or len(self._tokens[row]) >= self._limits[row]

    def _push(self, chosen: IntArray) -> list[str]:
        """Add the chosen tokens to the rows that are not finished; their new text."""
        pieces = []
        for row, token in enumerate(chosen.tolist()):
            if self._finished(row):
                pieces.append("")
                continue
            self._tokens[row].append(token)
            pieces.append(self._answers[row].push(token))
        return pieces

    def _choose(self, outputs: StepOutputs) -> IntArray:
        chosen: IntArray = outputs.next_token.copy()
        if outputs.logits is None:
            return chosen
        for row, logits in enumerate(outputs.logits):
            if not self._finished(row):
                try:
                    chosen[row] = self._samplers[row].next_token(logits)
                except BackendError as error:
                    raise BackendError(f"{error}. {self._where(row)}") from error
                if self._return_logits:
                    self._logits[row].append(logits)
        return chosen

    def _where(self, row: int) -> str:
        num_layers = self._pipe.bundle.manifest.language.num_hidden_layers
        return first_not_finite(self.visual, self.generation, num_layers, row)

    def _visual_scores(self, inputs: PrefillInputs, scores: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """The visual tokens' scores of each row."""
        return [scores[row][inputs.visual_rows[row] >= 0] for row in range(len(scores))]

    def _kept_indices(self, inputs: PrefillInputs, outputs: PrefillOutputs) -> list[IntArray]:
        """Kept positions of each row, in its prompt without padding."""
        kept_indices: list[IntArray] = [
            kept[start:] - pad
            for kept, start, pad in zip(outputs.kept_indices, inputs.kv_start.tolist(), inputs.pads, strict=True)
        ]
        return kept_indices
