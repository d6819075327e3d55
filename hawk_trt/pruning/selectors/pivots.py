"""DART at the level of embeddings: keep a few pivots, and what is least like them.

    pivots  the visual tokens of the largest L1 norm, which are kept, and as many text tokens
    kept    the visual tokens whose largest cosine similarity to a pivot is lowest

DART itself (Wen et al., 2025) works on the keys of a decoder layer; before layer 0 there are only embeddings.
"""

import numpy as np

from hawk_trt.pruning.selectors.candidates import Candidates, Float32Array, IntArray
from hawk_trt.pruning.selectors.ranking import best
from hawk_trt.pruning.selectors.similarity import unit_rows

_NUM_PIVOTS = 4  # of each kind


def dart(visual_embeds: Float32Array, text_embeds: Float32Array, k: int) -> IntArray:
    """Pivots and their opposites; the lower index on a tie.

    Args:
        visual_embeds: (n, hidden) float32.
        text_embeds: (num_text, hidden) float32, input embeddings of the instruction.
        k: tokens kept, at most n.

    Returns:
        int64 [k], ascending.
    """
    visual_pivots = _largest(visual_embeds, min(_NUM_PIVOTS, k))
    text_pivots = _largest(text_embeds, min(_NUM_PIVOTS, len(text_embeds)))
    unit = unit_rows(visual_embeds)
    pivots = np.concatenate([unit[visual_pivots], unit_rows(text_embeds[text_pivots])])
    unlikeness = -np.max(unit @ pivots.T, axis=1)
    unlikeness[visual_pivots] = np.inf
    return best(unlikeness, k)


def by_pivots(candidates: Candidates, k: int) -> IntArray:
    """The selector dart."""
    return dart(candidates.visual_embeds, candidates.text_embeds, k)


def _largest(vectors: Float32Array, count: int) -> IntArray:
    return best(np.abs(vectors).sum(axis=1), count)
