"""Choice by score: the best, the best with some variety, and how many of them carry a share of the score."""

import math

import numpy as np

from hawk_trt.pruning.selectors.candidates import Candidates, Float32Array, IntArray
from hawk_trt.pruning.selectors.similarity import unit_rows


def best(scores: Float32Array, k: int) -> IntArray:
    """The k highest scores, the lower index on a tie: int64 [k], ascending.

    Args:
        scores: (n) float32.
        k: at most n.
    """
    # a stable descending sort, so that the lower index wins a tie
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def by_score(candidates: Candidates, k: int) -> IntArray:
    """The selector of hawk, uniform and fastv-input; they differ in what the scores are made of."""
    return best(candidates.scores, k)


def by_norm(candidates: Candidates, k: int) -> IntArray:
    """The visual tokens whose embeddings are longest."""
    embeds = candidates.visual_embeds
    return best(np.einsum("nd,nd->n", embeds, embeds), k)


def by_chance(candidates: Candidates, k: int) -> IntArray:
    """Any, each alike; with the same seed a smaller k takes some of what a larger one takes."""
    return np.sort(candidates.rng.permutation(candidates.size)[:k])


def best_varied(scores: Float32Array, visual_embeds: Float32Array, k: int, diversity: float) -> IntArray:
    """The best by score, but the last places go to what is least like the tokens kept so far.

    Of the k places, floor(k * diversity) are filled from the next candidates by score, twice as many as these
    places: among scores so close to each other, the one farthest in angle from all kept tokens comes next.

    Args:
        scores: (n) float32.
        visual_embeds: (n, hidden) float32.
        k: at most n.
        diversity: share of the places, in [0, 1].

    Returns:
        int64 [k], ascending.
    """
    ranked = np.argsort(-scores, kind="stable")
    varied = math.floor(k * diversity)
    sure = ranked[: k - varied]
    # by index, so that the lower one wins where two are equally far
    near = np.sort(ranked[k - varied : k + varied])
    unit = unit_rows(visual_embeds)
    likest = np.max(unit[near] @ unit[sure].T, axis=1, initial=-np.inf)
    chosen = []
    for _ in range(varied):
        pick = int(np.argmin(likest))
        chosen.append(near[pick])
        likest = np.maximum(likest, unit[near] @ unit[near[pick]])
        likest[pick] = np.inf
    return np.sort(np.concatenate([sure, np.array(chosen, np.int64)]))


def count_of_mass(scores: Float32Array, mass: float) -> int:
    """Fewest tokens that together carry a share of the score mass.

    A token's mass is how far its score lies above the mean score, 0 below it.

    Args:
        scores: (n) float32, n at least 1.
        mass: the share, in (0, 1].

    Returns:
        At least 1; all where every score is the same.
    """
    above = np.maximum(scores.astype(np.float64) - scores.mean(dtype=np.float64), 0.0)
    reached = np.cumsum(np.sort(above)[::-1])
    if reached[-1] <= 0.0:
        return len(scores)
    return min(len(scores), int(np.searchsorted(reached, mass * reached[-1])) + 1)
