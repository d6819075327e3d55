"""DivPrune (Alvar et al., 2025): keep tokens that lie far apart, whatever the question.

D[i, j] = 1 - cos(v_i, v_j)
first   the token whose nearest other token is farthest
next    the token whose nearest kept token is farthest
"""

import numpy as np

from hawk_trt.pruning.selectors.candidates import Candidates, Float32Array, IntArray
from hawk_trt.pruning.selectors.similarity import unit_rows


def divprune(visual_embeds: Float32Array, k: int) -> IntArray:
    """Greedy max-min selection; the lower index on a tie, and no token twice.

    Args:
        visual_embeds: (n, hidden) float32.
        k: tokens kept, at most n.

    Returns:
        int64 [k], ascending.
    """
    n = len(visual_embeds)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    unit = unit_rows(visual_embeds)
    distance = np.float32(1.0) - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    chosen = np.empty(k, np.int64)
    nearest = distance.min(axis=1)
    for place in range(k):
        pick = int(np.argmax(nearest))
        chosen[place] = pick
        # the first pick was by distance to any token, from here on it is by distance to the kept ones
        nearest = distance[pick].copy() if place == 0 else np.minimum(nearest, distance[pick])
        nearest[chosen[: place + 1]] = -np.inf
    return np.sort(chosen)


def by_distance(candidates: Candidates, k: int) -> IntArray:
    """The selector divprune."""
    return divprune(candidates.visual_embeds, k)
