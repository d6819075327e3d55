"""How many visual tokens each prompt keeps, and which, where the host decides.

With one global quota the graph's own top-k decides. With a quota for each image or video the scores are
needed first; the choice then goes back into the graph through select_bias.
"""

import numpy as np
import numpy.typing as npt

from hawk_trt.config import PruningConfig
from hawk_trt.hawk import num_kept
from hawk_trt.layout import PromptLayout


def kept_count(prompt: PromptLayout, pruning: PruningConfig) -> int:
    """Visual tokens that a prompt keeps."""
    return sum(_quotas(prompt, pruning).values())


def needs_scores(prompt: PromptLayout, pruning: PruningConfig) -> bool:
    """Whether the host must see the scores before it can choose: several quotas, and something to drop."""
    return len(_quotas(prompt, pruning)) > 1 and kept_count(prompt, pruning) < prompt.num_visual


def choose(prompt: PromptLayout, scores: npt.NDArray[np.float32], pruning: PruningConfig) -> npt.NDArray[np.bool_]:
    """Keep each item's best tokens, the lower index on a tie.

    Args:
        prompt: the prompt.
        scores: float32 [num_visual].
        pruning: its quota and keep ratio.

    Returns:
        bool [num_visual].
    """
    items = prompt.items[prompt.visual_rows >= 0]
    kept = np.zeros(len(items), np.bool_)
    for item, count in _quotas(prompt, pruning).items():
        members = np.flatnonzero(items == item) if item >= 0 else np.arange(len(items))
        best = np.argsort(-scores[members], kind="stable")[:count]
        kept[members[best]] = True
    return kept


def _quotas(prompt: PromptLayout, pruning: PruningConfig) -> dict[int, int]:
    """Kept tokens by item; -1 stands for all items together."""
    items = prompt.items[prompt.visual_rows >= 0]
    if pruning.quota == "global":
        return {-1: num_kept(len(items), pruning.keep_ratio, pruning.min_visual_tokens)}
    found, sizes = np.unique(items, return_counts=True)
    return {
        int(item): num_kept(int(size), pruning.keep_ratio, pruning.min_visual_tokens)
        for item, size in zip(found, sizes, strict=True)
    }
