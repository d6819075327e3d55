"""Batch: rows of different requests that share decode steps.

A row joins after its own prefill and leaves at any time; where rows have come or gone, the next step first gathers the
caches of those that are there into one. A row alone decodes where its prefill wrote.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from hawk_trt.errors import BackendError
from hawk_trt.pipeline import Pipeline
from hawk_trt.row import Row, next_inputs
from hawk_trt.run import Run
from hawk_trt.runtime.diagnosis import first_not_finite
from hawk_trt.runtime.protocol import Generation
from hawk_trt.stages import in_place

# Columns that a cache is made or enlarged by: attention pays for all that there are, a gathering for those in use.
ROOM = 64


@dataclass(frozen=True, slots=True)
class _Cache:
    """A generation with the rows and columns that it has memory for."""

    generation: Generation
    batch: int
    columns: int


class Batch:
    """Rows between prefill and end.

    Attributes:
        rows: in the order of the next step.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.rows: list[Row] = []
        self._pipe = pipe
        self._places: list[tuple[_Cache, int]] = []  # of each row, its cache and number in it

    @property
    def cache_bytes(self) -> int:
        """Of the KV caches of all rows, as they lie in memory now."""
        return sum(cache.generation.nbytes for cache in {id(cache): cache for cache, _ in self._places}.values())

    def join(self, run: Run) -> None:
        """Take over the rows of a prefill."""
        cache = _Cache(run.generation, len(run.rows), run.columns)
        self.rows += run.rows
        self._places += [(cache, number) for number in range(len(run.rows))]

    def leave(self, row: Row) -> None:
        """Give up a row, if it is one of these; its memory comes back when the others are gathered."""
        if row in self.rows:
            place = self.rows.index(row)
            del self.rows[place], self._places[place]

    def step(self) -> list[tuple[Row, str | BackendError]]:
        """Decode one token a row.

        Returns:
            Of each row its new text, or why it cannot go on.

        Raises:
            BackendError: the runtime failed, and the caches cannot be used any more.
        """
        begun = time.perf_counter()
        generation = self.gathered()
        outputs = generation.decode(next_inputs(self.rows), logits=any(row.need_logits for row in self.rows))
        seconds = time.perf_counter() - begun
        taken: list[tuple[Row, str | BackendError]] = []
        for number, row in enumerate(self.rows):
            row.timings.decode += seconds
            try:
                taken.append((row, row.take(outputs, number, self._where)))
            except BackendError as error:  # one row's numbers are no other row's
                taken.append((row, error))
        return taken

    def gathered(self) -> Generation:
        """The one generation of all rows, with room for a column more; what left has given its memory back."""
        cache = self._places[0][0]
        length = max(_length(row) for row in self.rows) + 1
        compact = self._places == [(cache, number) for number in range(cache.batch)]
        if not compact or length > cache.columns:
            columns = min(length + ROOM, columns_needed(self.rows))
            parts = [(cache.generation, number) for cache, number in self._places]
            cache = _Cache(self._pipe.backend.gather(parts, columns), len(parts), columns)
            self._places = [(cache, number) for number in range(len(parts))]
        return cache.generation

    def _where(self, number: int) -> str:
        num_layers = self._pipe.bundle.manifest.language.num_hidden_layers
        return first_not_finite(None, self._places[0][0].generation, num_layers, number)


def columns_needed(rows: Iterable[Row]) -> int:
    """Columns of the KV cache that the longest of the rows takes at its end; the last token is not cached."""
    return max(row.kept_total + row.limit - 1 for row in rows)


def column_bytes(pipe: Pipeline) -> int:
    """Memory of one column of one row; a step that concatenates writes a new cache beside the old."""
    copies = 1 if in_place(pipe.backend.target) else 2
    return copies * pipe.bundle.manifest.kv_bytes_per_token


def _length(row: Row) -> int:
    """Columns of the cache that a row has written."""
    return len(row.kept) + len(row.token_ids) - 1
