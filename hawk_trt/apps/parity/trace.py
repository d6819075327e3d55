"""What a run of the PyTorch reference leaves behind, as numpy arrays for the comparison."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ReferenceTrace:
    """Every stage's output for one prompt.

    Attributes:
        visual_embeds: float32 [num_visual, hidden], in prompt order.
        inputs_embeds: float32 [seq_len, hidden], text and visual, before layer 0, masked positions left out.
        head_scores: float32 [heads, num_visual], raw, before normalisation.
        scores: float32 [num_visual], what ranks the visual tokens.
        visual_indices: int64 [num_visual], their positions in the prompt as given.
        topk_groups: int64 [num_visual], tokens with the same number competed in one top-k.
        kept_visual: int64 [num_kept], ordinals of the kept ones among the visual tokens, ascending.
        kept_indices: int64 [kept], text and visual positions kept, in the prompt as given, ascending.
        query_indices: int64 [query], in the prompt as given; empty without visual tokens.
        hidden_states: float32 [kept, hidden], output of layer 0.
        position_ids: int64 [axes, seq_len], masked positions left out.
        kept_position_ids: int64 [axes, kept].
        logits: float32 [steps, vocab]; row i is what tokens[i] was chosen from, or forced after.
        tokens: the greedy choices, or the tokens forced.
    """

    visual_embeds: npt.NDArray[np.float32]
    inputs_embeds: npt.NDArray[np.float32]
    head_scores: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    visual_indices: npt.NDArray[np.int64]
    topk_groups: npt.NDArray[np.int64]
    kept_visual: npt.NDArray[np.int64]
    kept_indices: npt.NDArray[np.int64]
    query_indices: npt.NDArray[np.int64]
    hidden_states: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int64]
    kept_position_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    tokens: tuple[int, ...]
