"""Backends: what runs the three stages. A backend keeps weights; a Row is one sequence's place in a KV cache."""

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
class StepOutputs:
    """A step leaves the most probable next_token, int64 [batch]; logits are float32 [batch, vocab] where asked for."""

    next_token: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class PrefillOutputs:
    """What a prefill leaves: a row for each prompt, and on the host the outputs of its step.

    kept_indices: int64 [batch, num_kept_total].  scores: float32 [batch, seq_len].
    first_layer_seconds, decoder_seconds: of the two stages.
    """

    rows: "Sequence[Row]"
    step: StepOutputs
    kept_indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    first_layer_seconds: float
    decoder_seconds: float


class Row(Protocol):
    """One sequence's place in a KV cache, from its prefill until it is released or nobody refers to it any more."""

    @property
    def nbytes(self) -> int:
        """Bytes of its part of the cache."""

    def release(self) -> None:
        """Nobody asks for this sequence any more; its memory comes back when the others are gathered."""

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of its last step: float32 [num_kept_total, hidden]."""

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [kv_heads, columns, head_dim], as far as written.

        Of a linear layer its states: [conv_dim, conv_kernel - 1] and [heads, key_head_dim, value_head_dim].
        """


class Backend(Protocol):
    """A loaded model, on device "cpu", "cuda" or "cuda:N"; target: of the graphs that it runs.

    max_vision_patches: of one vision call; one frame alone may have more.  max_context: columns that a KV cache can
    have, None where a request takes what it needs.  max_batch: rows of a decode step, None without bound.
    """

    name: str
    device: str
    target: str
    max_vision_patches: int
    max_context: int | None
    max_batch: int | None

    @property
    def max_start(self) -> int | None:
        """Prompts that a prefill has place for beside the rows that run now, 1 at least; None without bound."""

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> Visual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""

    def keep(self, visual: Visual) -> Visual:
        """What encode made, as it may lie around while encode runs again: itself, or a copy for join alone."""

    def join(self, parts: Sequence[Visual]) -> Visual:
        """What keep gave, one below the other, for a prefill; at least one part."""

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]."""

    def prefill(self, inputs: PrefillInputs, visual: Visual, columns: int, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over prompts, into rows whose KV cache holds up to `columns` tokens each."""

    def gather(self, rows: Sequence[Row], length: int, columns: int) -> None:
        """Bring rows together for a step, where they have room for so many tokens; a new cache has room for `columns`.

        Where this fails the rows are of no use any more.
        """

    def decode(
        self, rows: Sequence[Row], tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], *, logits: bool
    ) -> StepOutputs:
        """Run both stages over one token of each row. tokens, positions: int64 [rows]; a position is of all axes."""

    def close(self) -> None:
        """Release everything."""
