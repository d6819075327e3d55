"""What a run of the PyTorch reference leaves behind, as numpy arrays for the comparison."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReferenceTrace:
    """Every stage's output for one prompt; seq_len and position_ids leave out masked positions.

    Attributes:
        visual_embeds: [num_visual, hidden], in prompt order.
        inputs_embeds: [seq_len, hidden], text and visual, before layer 0.
        head_scores: [heads, num_visual], raw, before normalisation.
        scores: [num_visual], what ranks the visual tokens.
        visual_indices: [num_visual], their positions in the prompt as given.
        topk_groups: [num_visual], tokens with the same number competed in one top-k.
        kept_visual: [num_kept], ordinals of the kept ones among the visual tokens, ascending.
        kept_indices: [kept], text and visual positions kept, in the prompt as given, ascending.
        query_indices: [query], in the prompt as given; empty without visual tokens.
        hidden_states: [kept, hidden], output of layer 0.
        position_ids: [axes, seq_len].
        kept_position_ids: [axes, kept].
        logits: [steps, vocab]; row i is what tokens[i] was chosen from, or forced after.
        tokens: the greedy choices, or the tokens forced.
    """

    visual_embeds: _Floats
    inputs_embeds: _Floats
    head_scores: _Floats
    scores: _Floats
    visual_indices: _Ints
    topk_groups: _Ints
    kept_visual: _Ints
    kept_indices: _Ints
    query_indices: _Ints
    hidden_states: _Floats
    position_ids: _Ints
    kept_position_ids: _Ints
    logits: _Floats
    tokens: tuple[int, ...]
