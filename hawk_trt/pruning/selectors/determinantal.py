"""CDPruner (Zhang et al., 2025): a determinantal point process over tokens, conditioned on the instruction.

    L[i, j] = cos(v_i, v_j)
    r       = minmax_i( mean over text tokens t of cos(v_i, t) )
    kernel  = diag(r) L diag(r)
    kept    = greedy MAP: one after another, the token that raises the determinant of the kept ones' kernel most

The greedy step is an incremental Cholesky factorisation: d_i is what token i adds, and after picking j,
e_i = (kernel[j, i] - c_j . c_i) / sqrt(d_j) is appended to c_i and its square taken from d_i.
"""

import numpy as np

from hawk_trt.pruning.selectors.candidates import Candidates, Float32Array, IntArray
from hawk_trt.pruning.selectors.ranking import best
from hawk_trt.pruning.selectors.similarity import unit_rows

# Share of a token's own variance below which nothing of it is left that the kept ones do not span:
# some ten times the rounding error of float32.
_EXHAUSTED = np.float32(1e-6)


def cdpruner(visual_embeds: Float32Array, text_embeds: Float32Array, k: int) -> IntArray:
    """Greedy MAP of the conditional DPP; the lower index on a tie.

    Once the kept tokens span all others, the determinant is 0 whatever comes next: the remaining places go to
    the most relevant tokens. Without text, or where all tokens are equally relevant, r is 1.

    Args:
        visual_embeds: (n, hidden) float32.
        text_embeds: (num_text, hidden) float32, input embeddings of the instruction.
        k: tokens kept, at most n.

    Returns:
        int64 [k], ascending.
    """
    n = len(visual_embeds)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    unit = unit_rows(visual_embeds)
    relevance = _relevance(unit, text_embeds)
    kernel = (unit @ unit.T) * relevance[:, None] * relevance
    gain = np.diagonal(kernel).copy()
    floor = _EXHAUSTED * gain
    factors = np.empty((k, n), np.float32)
    left = np.ones(n, np.bool_)
    for place in range(k):
        offers = np.where(left & (gain > floor), gain, np.float32(-np.inf))
        pick = int(np.argmax(offers))
        if offers[pick] == -np.inf:
            rest = np.flatnonzero(left)
            left[rest[best(relevance[rest], k - place)]] = False
            break
        known = factors[:place]
        factors[place] = (kernel[pick] - known[:, pick] @ known) / np.sqrt(gain[pick])
        gain -= factors[place] ** 2
        left[pick] = False
    return np.flatnonzero(~left)


def by_determinant(candidates: Candidates, k: int) -> IntArray:
    """The selector cdpruner."""
    return cdpruner(candidates.visual_embeds, candidates.text_embeds, k)


def _relevance(unit: Float32Array, text_embeds: Float32Array) -> Float32Array:
    """How near each token is to the text, in [0, 1]: float32 [n]."""
    if not len(text_embeds):
        return np.ones(len(unit), np.float32)
    # the mean commutes with the product: one vector instead of a matrix
    nearness = unit @ unit_rows(text_embeds).mean(axis=0)
    low, high = nearness.min(), nearness.max()
    if high <= low:
        return np.ones(len(unit), np.float32)
    relevance: Float32Array = (nearness - low) / (high - low)
    return relevance
