"""How many visual tokens each prompt keeps, and which, where the host decides.

With scores, one pool and a plain count the graph's own top-k decides. Anything else is chosen here, from what the
stages have made so far, and goes into the graph through select_bias.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import PrefillInputs, PromptLayout, collate
from hawk_trt.pruning.hawk import num_kept
from hawk_trt.request import EQUAL_HEADS, SCORED, PruningConfig, check_head_weights
from hawk_trt.runtime.protocol import Backend, Visual

if TYPE_CHECKING:
    from hawk_trt.pruning.selectors import Candidates

Float32Array: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]


def head_weights(bundle: Bundle, pruning: PruningConfig) -> Float32Array:
    """The weights that the graph gets: the caller's, else the bundle's, else equal ones: float32 [heads].

    Raises:
        InvalidInput: the caller's do not fit the model.
    """
    num_heads = bundle.manifest.language.num_attention_heads
    if pruning.selector in EQUAL_HEADS:
        return np.full(num_heads, 1.0 / num_heads, np.float32)
    weights = pruning.head_weights or bundle.manifest.head_weights.values
    return np.array(check_head_weights(weights, num_heads), np.float32)


def asked_by(prompt: PromptLayout, pruning: PruningConfig) -> PromptLayout:
    """The prompt with the query tokens of the selector: for fastv-input the last token alone."""
    if pruning.selector != "fastv-input" or not prompt.num_visual:
        return prompt
    weights = np.zeros(prompt.num_tokens, np.float32)
    weights[-1] = 1.0
    return replace(prompt, query_weights=weights)


def kept_count(prompt: PromptLayout, pruning: PruningConfig) -> int:
    """Visual tokens that a prompt keeps, at most (keep_mass may ask for fewer)."""
    return sum(_limit(pool, pruning) for pool in _pools(prompt, pruning))


def graph_chooses(prompt: PromptLayout, pruning: PruningConfig) -> bool:
    """Whether the graph's own top-k makes the choice."""
    if pruning.keep_mass is not None and prompt.num_visual:
        return False
    if kept_count(prompt, pruning) == prompt.num_visual:
        return True
    return pruning.selector in SCORED and not pruning.diversity and len(_pools(prompt, pruning)) == 1


class Source:
    """What a selector may read of the rows of a batch; each is made once, when first read.

    Attributes:
        score_seconds: spent in first_layer for the scores.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        prompts: Sequence[PromptLayout],
        inputs: PrefillInputs,
        visual: Visual,
    ) -> None:
        self.score_seconds = 0.0
        self._bundle = bundle
        self._backend = backend
        self._prompts = prompts
        self._inputs = inputs
        self._visual = visual
        self._scores: Float32Array | None = None
        self._embeds: npt.NDArray[np.generic] | None = None

    @property
    def scored(self) -> bool:
        """Whether the scores were read."""
        return self._scores is not None

    def scores(self, row: int) -> Float32Array:
        """HAWK's scores of a row's visual tokens: float32 [num_visual]."""
        if self._scores is None:
            begun = time.perf_counter()
            self._scores = self._backend.score(self._inputs, self._visual)
            self.score_seconds = time.perf_counter() - begun
        scores: Float32Array = self._scores[row][self._inputs.source_rows[row] >= 0]
        return scores

    def visual_embeds(self, row: int) -> Float32Array:
        """Embeddings of a row's visual tokens: float32 [num_visual, hidden]."""
        if self._embeds is None:
            self._embeds = self._visual.numpy()
        rows = self._inputs.source_rows[row]
        embeds: Float32Array = self._embeds[rows[rows >= 0]].astype(np.float32)
        return embeds

    def text_embeds(self, row: int) -> Float32Array:
        """Input embeddings of a row's query tokens: float32 [num_text, hidden]."""
        prompt = self._prompts[row]
        asked = (prompt.query_weights > 0) & (prompt.visual_rows < 0)
        embeds: Float32Array = self._bundle.embedding_table()[prompt.input_ids[asked]].astype(np.float32)
        return embeds


@dataclass(frozen=True, slots=True)
class Selection:
    """What a prefill runs over.

    Attributes:
        inputs: of first_layer, with the choice where the host made it.
        scores: float32 [num_visual] of each prompt, where the host read them; None where the graph tells.
        seconds: that the host took to choose, without first_layer's own.
    """

    inputs: PrefillInputs
    scores: list[Float32Array] | None
    seconds: float


def select(
    prompts: Sequence[tuple[PromptLayout, PruningConfig]], bundle: Bundle, backend: Backend, visual: Visual
) -> Selection:
    """Lay prompts side by side for a prefill; the host chooses their tokens where the graph cannot.

    Args:
        prompts: with the same head weights.
        bundle: of the model.
        backend: that runs it.
        visual: embeddings of all prompts.

    Raises:
        InvalidInput: a caller's own selector gave something else than k of the candidates.
    """
    layouts = [layout for layout, _ in prompts]
    weights = head_weights(bundle, prompts[0][1])
    inputs = collate(layouts, [kept_count(*prompt) for prompt in prompts], [None] * len(prompts), weights)
    if all(graph_chooses(*prompt) for prompt in prompts):
        return Selection(inputs, None, 0.0)
    begun = time.perf_counter()
    source = Source(bundle, backend, layouts, inputs, visual)
    chosen = [choose(layout, source, row, pruning) for row, (layout, pruning) in enumerate(prompts)]
    inputs = collate(layouts, [int(kept.sum()) for kept in chosen], chosen, weights)
    scores = [source.scores(row) for row in range(len(prompts))] if source.scored else None
    return Selection(inputs, scores, time.perf_counter() - begun - source.score_seconds)


def choose(prompt: PromptLayout, source: Source, row: int, pruning: PruningConfig) -> npt.NDArray[np.bool_]:
    """The kept tokens of a prompt, pool by pool: bool [num_visual].

    Args:
        prompt: row `row` of the batch.
        source: of the batch.
        row: its number.
        pruning: how to choose.

    Raises:
        InvalidInput: a caller's own selector gave something else than k of the candidates.
    """
    from hawk_trt.pruning.selectors import Candidates  # few prompts need the selectors of the host

    rng = np.random.default_rng(pruning.seed)
    kept = np.zeros(prompt.num_visual, np.bool_)
    for pool in _pools(prompt, pruning):
        candidates = Candidates(
            members=pool,
            rng=rng,
            read_scores=lambda: source.scores(row),
            read_visual=lambda: source.visual_embeds(row),
            read_text=lambda: source.text_embeds(row),
        )
        kept[pool[_choose(candidates, pruning)]] = True
    return kept


def _choose(candidates: "Candidates", pruning: PruningConfig) -> IntArray:
    """Which of a pool are kept, by their places in it."""
    from hawk_trt.pruning.selectors import SELECTORS, best_varied, count_of_mass

    k = _limit(candidates.members, pruning)
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


def _limit(pool: IntArray, pruning: PruningConfig) -> int:
    return num_kept(len(pool), pruning.keep_ratio, pruning.min_visual_tokens)


def _pools(prompt: PromptLayout, pruning: PruningConfig) -> list[IntArray]:
    """The places of the visual tokens that compete with each other, one array a pool."""
    visual = prompt.visual_rows >= 0
    if not visual.any():
        return []
    if pruning.quota == "global":
        return [np.arange(int(visual.sum()))]
    groups = (prompt.items if pruning.quota == "per-image" else prompt.frames)[visual]
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]
