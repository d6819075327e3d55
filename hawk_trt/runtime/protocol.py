"""Backends: what runs the three stages. A backend keeps weights; a Generation keeps one request's KV cache.

backend.encode(feeds, num_rows)            vision          -> Visual
backend.keep(visual), .join(visuals)                       -> Visual
backend.score(inputs, visual)              first_layer     -> scores alone, nothing kept
backend.start(batch, columns) -> Generation
backend.gather(parts, columns) -> Generation            rows of several generations as one, for their next steps
.release(row)                          a row that has ended
.prefill(inputs, visual)               first_layer and decoder over the prompt
.decode(inputs)                        both over one token a row
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hawk_trt.inputs.layout import PrefillInputs


class Visual(Protocol):
    """Visual embeddings where the backend keeps them: [rows, hidden] in the model's dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, DeepStack's features included."""

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Host inputs of a decode step.

    token_ids: int64 [batch].  position_ids: int64 [batch], the same on all axes.
    """

    token_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step leaves on the host.

    next_token: int64 [batch], the most probable.  logits: float32 [batch, vocab] where asked for.
    """

    next_token: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class PrefillOutputs:
    """What a prefill leaves on the host.

    kept_indices: int64 [batch, num_kept_total].  scores: float32 [batch, seq_len].
    first_layer_seconds, decoder_seconds: of the two stages.
    """

    step: StepOutputs
    kept_indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    first_layer_seconds: float
    decoder_seconds: float


class Generation(Protocol):
    """Prompts that were prefilled together, or gathered, with their KV cache.

    Attributes:
        batch: rows.
        columns: that a row of the cache can hold.
    """

    batch: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of its KV cache."""

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt."""

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both over one token a row."""

    def release(self, row: int) -> None:
        """Nobody asks for this row any more; the others go on once they are gathered."""

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, columns, head_dim], as far as written.

        Of a linear layer its states: [batch, conv_dim, conv_kernel - 1], [batch, heads, key_head_dim, value_head_dim].
        """


class Backend(Protocol):
    """A loaded model.

    Attributes:
        name: of the backend.
        device: "cpu", "cuda" or "cuda:N".
        target: of the graphs that it runs.
        max_vision_patches: of one vision call; one frame alone may have more.
        max_context: columns that a KV cache can have, None where a request takes what it needs.
        max_batch: rows of a generation, None without bound.
        can_gather: whether there is gather; without it one generation ends before the next starts.
        max_start: rows of a generation that start has place for now, at least one; None without bound.
    """

    name: str
    device: str
    target: str
    max_vision_patches: int
    max_context: int | None
    max_batch: int | None
    can_gather: bool

    @property
    def max_start(self) -> int | None:
        """Rows that a generation can have now, which changes as others come and go."""

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> Visual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""

    def keep(self, visual: Visual) -> Visual:
        """What encode made, as it may lie around while encode runs again: itself, or a copy for join alone."""

    def join(self, parts: Sequence[Visual]) -> Visual:
        """What keep gave, one below the other, for a prefill; at least one part."""

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]."""

    def start(self, batch: int, columns: int) -> Generation:
        """A generation whose KV cache holds up to `columns` tokens a row."""

    def gather(self, parts: "Sequence[tuple[Generation, int]]", columns: int) -> Generation:
        """Rows of several generations as one, which decodes on from where each is.

        Args:
            parts: a generation and the number of one of its rows, for each row of the new one. They are used up,
                also where this fails.
            columns: that its KV cache holds a row.
        """

    def close(self) -> None:
        """Release everything."""
