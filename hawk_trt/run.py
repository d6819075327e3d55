"""Run: one batch of prompts on its way through the stages, from layouts to results."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hawk_trt.inputs.layout import PrefillInputs, collate
from hawk_trt.pruning.selection import Source, choose, graph_chooses, kept_count
from hawk_trt.request import Result, Timings
from hawk_trt.row import Row, next_inputs
from hawk_trt.runtime.diagnosis import first_not_finite
from hawk_trt.runtime.protocol import PrefillOutputs, StepOutputs

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline


class Run:
    """The state of one batch.

    Attributes:
        rows: pruned with the same head weights.
        visual: visual embeddings of all rows, after prefill.
        generation: the backend's KV cache, after prefill.
        columns: that a row of it can hold.
    """

    def __init__(self, pipe: "Pipeline", rows: Sequence[Row], started: float) -> None:
        self.rows = rows
        self._pipe = pipe
        self._started = started
        self._timings = Timings(preprocess=time.perf_counter() - started)
        for row in rows:
            row.timings = self._timings

    def steps(self) -> Iterator[list[str]]:
        """Prefill, then decode to the end; yields the new text of each row after each step."""
        yield self.take(self.prefill())
        while not all(row.finished for row in self.rows):
            yield self.take(self.decode())
        rest = [row.flush() for row in self.rows]
        self._timings.total = time.perf_counter() - self._started
        yield rest

    def prefill(self, room: int | None = None) -> StepOutputs:
        """Run the stages over the prompts.

        Args:
            room: tokens that can then be decoded, at most; None is as many as the rows may need.
        """
        backend = self._pipe.backend
        begun = time.perf_counter()
        layouts = [row.layout for row in self.rows]
        self.visual, cached = self._pipe.encode_rows([row.inputs for row in self.rows], layouts)
        encoded = time.perf_counter()
        inputs, scores = self._select()
        if backend.max_context is not None:  # the answer also ends where the cache does; its last token is not cached
            longest = max(backend.max_context - inputs.num_kept_total + 1, 1)
            for row in self.rows:
                row.limit = min(row.limit, longest)
        steps = max(row.limit for row in self.rows) - 1
        steps = steps if room is None else min(steps, room)
        self.columns = inputs.num_kept_total + steps
        self.generation = backend.start(len(self.rows), self.columns)
        prepared = time.perf_counter()
        # the sampler looks at the first logits in any case, and tells a broken run from an answer
        outputs = self.generation.prefill(inputs, self.visual, logits=True)
        for number, row in enumerate(self.rows):
            row.num_cached = cached[number]
            row.kept = outputs.kept_indices[number, inputs.kv_start[number] :] - inputs.pads[number]
            row.scores = _visual_scores(inputs, outputs, number) if scores is None else scores[number]
        self._timings.vision = encoded - begun
        self._timings.first_layer = prepared - encoded - self._timings.select + outputs.first_layer_seconds
        self._timings.decoder = outputs.decoder_seconds
        return outputs.step

    def _select(self) -> tuple[PrefillInputs, list[npt.NDArray[np.float32]] | None]:
        """The prefill's inputs, with the choice where the host makes it, and the scores where that read them."""
        rows, layouts, weights = self.rows, [row.layout for row in self.rows], self.rows[0].head_weights
        limits = [kept_count(row.layout, row.pruning) for row in rows]
        inputs = collate(layouts, limits, [None] * len(limits), weights)
        if all(graph_chooses(row.layout, row.pruning) for row in rows):
            return inputs, None
        begun = time.perf_counter()
        source = Source(self._pipe.bundle, self._pipe.backend, layouts, inputs, self.visual)
        chosen = [choose(row.layout, source, number, row.pruning) for number, row in enumerate(rows)]
        counts = [int(kept.sum()) for kept in chosen]
        inputs = collate(layouts, counts, chosen, weights)
        scores = [source.scores(number) for number in range(len(rows))] if source.scored else None
        self._timings.select = time.perf_counter() - begun - source.score_seconds
        return inputs, scores

    def decode(self, tokens: npt.NDArray[np.int64] | None = None) -> StepOutputs:
        """Run one step over the rows' last tokens, or over the given ones: int64 [rows]."""
        begun = time.perf_counter()
        logits = any(row.need_logits for row in self.rows)
        outputs = self.generation.decode(next_inputs(self.rows, tokens), logits=logits)
        self._timings.decode += time.perf_counter() - begun
        return outputs

    def take(self, outputs: StepOutputs) -> list[str]:
        """Add a step's tokens to the rows that are not finished; their new text."""
        return ["" if row.finished else row.take(outputs, number, self.where) for number, row in enumerate(self.rows)]

    def where(self, number: int) -> str:
        """What first went wrong in a row's prefill or last step."""
        num_layers = self._pipe.bundle.manifest.language.num_hidden_layers
        return first_not_finite(self.visual, self.generation, num_layers, number)

    def results(self) -> list[Result]:
        """The result of each row."""
        return [row.result() for row in self.rows]


def _visual_scores(inputs: PrefillInputs, outputs: PrefillOutputs, number: int) -> npt.NDArray[np.float32]:
    """The scores of a row's visual tokens."""
    scores: npt.NDArray[np.float32] = outputs.scores[number][inputs.visual_rows[number] >= 0]
    return scores
