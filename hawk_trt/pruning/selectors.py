"""Selectors: who chooses the visual tokens that are kept.

hawk          HAWK's scores, each head by its weight
uniform       HAWK's scores, all heads alike
fastv-input   the same, asked by the last prompt token instead of the question: what FastV becomes before layer 0
random        chance, by PruningConfig.seed
divprune      tokens far apart
cdpruner      tokens far apart that fit the question
dart          tokens unlike a few pivots
norm          tokens of long embeddings

The graph's own top-k carries out the first three; the others choose on the host, and the choice enters the same graphs
through select_bias. A selector is a function of Candidates and k, so a caller can give one of their own. The lower
index wins a tie everywhere.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import PrefillInputs, PromptLayout
from hawk_trt.request import PruningConfig, Selector
from hawk_trt.runtime.protocol import Backend, Visual

Float32Array: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]

# Share of a token's own variance below which the kept tokens span it: some ten times the rounding error of float32.
_EXHAUSTED = np.float32(1e-6)
_NUM_PIVOTS = 4  # of dart, visual and text ones each
_SMALLEST_NORM = np.float32(1e-12)


@dataclass
class Source:
    """What a selector may read of the prompts of a batch, made when first read; score_seconds: spent on the scores."""

    bundle: Bundle
    backend: Backend
    prompts: Sequence[PromptLayout]
    inputs: PrefillInputs
    visual: Visual
    score_seconds: float | None = None

    @cached_property
    def scores(self) -> list[Float32Array]:
        """HAWK's scores of each prompt's visual tokens: float32 [num_visual]."""
        begun = time.perf_counter()
        scores = self.backend.score(self.inputs, self.visual)
        self.score_seconds = time.perf_counter() - begun
        return [own[rows >= 0] for own, rows in zip(scores, self.inputs.source_rows, strict=True)]

    @cached_property
    def visual_embeds(self) -> list[Float32Array]:
        """Embeddings of each prompt's visual tokens: float32 [num_visual, hidden]."""
        embeds = self.visual.numpy()
        return [embeds[rows[rows >= 0]].astype(np.float32) for rows in self.inputs.source_rows]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Visual tokens that compete: all of a prompt, or those of one image or frame.

    members: int64 [n], their places among the prompt's visual tokens.  rng: seeded by PruningConfig.seed; one for all
    pools of a prompt.  row: of the prompt in the batch of the source.
    """

    members: IntArray
    rng: np.random.Generator
    source: Source
    row: int

    @property
    def size(self) -> int:
        """Number of candidates."""
        return len(self.members)

    @property
    def scores(self) -> Float32Array:
        """HAWK's scores, float32 [n]. The first read runs the first layer once more, over one kept token."""
        return self.source.scores[self.row][self.members]

    @property
    def visual_embeds(self) -> Float32Array:
        """The vision stage's output, float32 [n, hidden]. The first read copies it from the device."""
        return self.source.visual_embeds[self.row][self.members]

    @property
    def text_embeds(self) -> Float32Array:
        """Input embeddings of the query tokens: float32 [num_text, hidden]."""
        prompt = self.source.prompts[self.row]
        asked = (prompt.query_weights > 0) & (prompt.visual_rows < 0)
        embeds: Float32Array = self.source.bundle.embedding_table()[prompt.input_ids[asked]].astype(np.float32)
        return embeds


def choose(candidates: Candidates, k: int, pruning: PruningConfig) -> IntArray:
    """Places of the candidates that are kept, at most k; InvalidInput where a caller's own selector gives others."""
    if pruning.keep_mass is not None:
        k = min(k, max(pruning.min_visual_tokens, count_of_mass(candidates.scores, pruning.keep_mass)))
    if k == candidates.size:
        return np.arange(k)
    if pruning.diversity:
        return best_varied(candidates.scores, candidates.visual_embeds, k, pruning.diversity)
    if isinstance(pruning.selector, str):
        return SELECTORS[pruning.selector](candidates, k)
    chosen = np.asarray(pruning.selector(candidates, k))  # a caller's own, checked
    if (
        chosen.shape != (k,)
        or chosen.dtype.kind not in "iu"
        or len(np.unique(chosen)) != k
        or not ((chosen >= 0) & (chosen < candidates.size)).all()
    ):
        raise InvalidInput(
            f"selector: got {chosen.dtype}{list(chosen.shape)}, expected {k} different integers from 0 to "
            f"{candidates.size - 1}"
        )
    return chosen


def best(scores: Float32Array, k: int) -> IntArray:
    """The k highest of float32 [n], k at most n: int64 [k], ascending."""
    # a stable descending sort, so that the lower index wins a tie
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def best_varied(scores: Float32Array, visual_embeds: Float32Array, k: int, diversity: float) -> IntArray:
    """The best by score, but the last places go to what is least like the tokens kept so far.

    Of the k places, floor(k * diversity) are filled from the next candidates by score, twice as many as these
    places: among scores so close to each other, the one farthest in angle from all kept tokens comes next.

    scores are float32 (n), visual_embeds (n, hidden). Returns int64 [k], ascending.
    """
    ranked = np.argsort(-scores, kind="stable")
    varied = math.floor(k * diversity)
    sure = ranked[: k - varied]
    # by index, so that the lower one wins where two are equally far
    near = np.sort(ranked[k - varied : k + varied])
    unit = _unit_rows(visual_embeds)
    likest = np.max(unit[near] @ unit[sure].T, axis=1, initial=-np.inf)
    chosen = []
    for _ in range(varied):
        pick = int(np.argmin(likest))
        chosen.append(near[pick])
        likest = np.maximum(likest, unit[near] @ unit[near[pick]])
        likest[pick] = np.inf
    return np.sort(np.concatenate([sure, np.array(chosen, np.int64)]))


def count_of_mass(scores: Float32Array, mass: float) -> int:
    """Fewest tokens that together carry a share of the score mass, in (0, 1].

    A token's mass is how far its score lies above the mean score, 0 below it. All tokens where every score is the same.
    """
    above = np.maximum(scores.astype(np.float64) - scores.mean(dtype=np.float64), 0.0)
    reached = np.cumsum(np.sort(above)[::-1])
    if reached[-1] <= 0.0:
        return len(scores)
    return min(len(scores), int(np.searchsorted(reached, mass * reached[-1])) + 1)


def divprune(visual_embeds: Float32Array, k: int) -> IntArray:
    """DivPrune (Alvar et al., 2025): greedy max-min selection of tokens that lie far apart, no token twice.

    D[i, j] = 1 - cos(v_i, v_j); first the token whose nearest other token is farthest, next the token whose nearest
    kept token is farthest. visual_embeds are float32 (n, hidden). Returns int64 [k], ascending.
    """
    n = len(visual_embeds)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    unit = _unit_rows(visual_embeds)
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


def cdpruner(visual_embeds: Float32Array, text_embeds: Float32Array, k: int) -> IntArray:
    """CDPruner (Zhang et al., 2025): greedy MAP of a determinantal point process, conditioned on the instruction.

        L[i, j] = cos(v_i, v_j)
        r       = minmax_i( mean over text tokens t of cos(v_i, t) )
        kernel  = diag(r) L diag(r)

    One after another, the token is kept that raises the determinant of the kept ones' kernel most. The step is an
    incremental Cholesky factorisation: d_i is what token i adds, and after picking j,
    e_i = (kernel[j, i] - c_j . c_i) / sqrt(d_j) is appended to c_i and its square taken from d_i.
    Once the kept tokens span all others, the determinant is 0 whatever comes next: the remaining places go to the most
    relevant tokens. Without text, or where all tokens are equally relevant, r is 1.

    visual_embeds are float32 (n, hidden), text_embeds (num_text, hidden), input embeddings of the instruction.
    Returns int64 [k], ascending.
    """
    n = len(visual_embeds)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    unit = _unit_rows(visual_embeds)
    relevance = np.ones(n, np.float32)
    if len(text_embeds):
        # the mean commutes with the product: one vector instead of a matrix
        nearness = unit @ _unit_rows(text_embeds).mean(axis=0)
        low, high = nearness.min(), nearness.max()
        if high > low:
            relevance = (nearness - low) / (high - low)
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


def dart(visual_embeds: Float32Array, text_embeds: Float32Array, k: int) -> IntArray:
    """DART (Wen et al., 2025) at the level of embeddings: keep a few pivots, and what is least like them.

    The pivots are the visual tokens of the largest L1 norm, which are kept, and as many text tokens; then come the
    visual tokens whose largest cosine similarity to a pivot is lowest. DART itself works on the keys of a decoder
    layer; before layer 0 there are only embeddings. The arguments are those of cdpruner.
    """
    visual_pivots, text_pivots = (
        best(np.abs(vectors).sum(axis=1), min(_NUM_PIVOTS, most))
        for vectors, most in ((visual_embeds, k), (text_embeds, len(text_embeds)))
    )
    unit = _unit_rows(visual_embeds)
    pivots = np.concatenate([unit[visual_pivots], _unit_rows(text_embeds[text_pivots])])
    unlikeness = -np.max(unit @ pivots.T, axis=1)
    unlikeness[visual_pivots] = np.inf
    return best(unlikeness, k)


def _unit_rows(vectors: Float32Array) -> Float32Array:
    """Rows (n, hidden) scaled to length 1; a row of zeros stays."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    unit: Float32Array = vectors / np.maximum(norms, _SMALLEST_NORM)
    return unit


def _norm(candidates: Candidates, k: int) -> IntArray:
    embeds = candidates.visual_embeds
    return best(np.einsum("nd,nd->n", embeds, embeds), k)


# hawk, uniform and fastv-input differ in what the scores are made of; with the same seed a smaller k of random takes
# some of what a larger one takes
SELECTORS: dict[str, Selector] = {
    **dict.fromkeys(("hawk", "uniform", "fastv-input"), lambda candidates, k: best(candidates.scores, k)),
    "random": lambda candidates, k: np.sort(candidates.rng.permutation(candidates.size)[:k]),
    "divprune": lambda candidates, k: divprune(candidates.visual_embeds, k),
    "cdpruner": lambda candidates, k: cdpruner(candidates.visual_embeds, candidates.text_embeds, k),
    "dart": lambda candidates, k: dart(candidates.visual_embeds, candidates.text_embeds, k),
    "norm": _norm,
}
