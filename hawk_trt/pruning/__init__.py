"""How many visual tokens each prompt keeps, and which, where the host decides.

With scores, one pool and a plain count the graph's own top-k decides. Anything else is chosen on the host, by
selectors.py, from what the stages have made so far, and goes into the graph through select_bias.
"""

import time
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Bundle
from hawk_trt.inputs.layout import PrefillInputs, PromptLayout, collate
from hawk_trt.request import EQUAL_HEADS, READ_TEXT, SCORED, PruningConfig, check_head_weights, num_kept
from hawk_trt.runtime.protocol import Backend, Visual

Float32Array: TypeAlias = npt.NDArray[np.float32]


def weights_for(bundle: Bundle, pruning: PruningConfig) -> Float32Array:
    """The weights that the graph gets: the caller's, else the bundle's, else equal ones: float32 [heads]."""
    num_heads = bundle.manifest.language.num_attention_heads
    if pruning.selector in EQUAL_HEADS:
        return np.full(num_heads, 1.0 / num_heads, np.float32)
    weights = pruning.head_weights or bundle.manifest.head_weights.values
    return np.array(check_head_weights(weights, num_heads), np.float32)


def query_of(pruning: PruningConfig) -> str | None:
    """Which text asks: the caller's query, but for selectors that need one of their own."""
    if pruning.selector == "fastv-input":
        return "last"
    if pruning.selector in READ_TEXT and pruning.query == "last":
        return None  # the embedding of a token of the chat template tells nothing of the question
    return pruning.query


def kept_count(prompt: PromptLayout, pruning: PruningConfig) -> int:
    """Visual tokens that a prompt keeps, at most (keep_mass may ask for fewer)."""
    return sum(_limit(pool, pruning) for pool in _pools(prompt, pruning))


def select(
    prompts: Sequence[tuple[PromptLayout, PruningConfig]], bundle: Bundle, backend: Backend, visual: Visual
) -> tuple[PrefillInputs, list[Float32Array] | None, float]:
    """Lay prompts of the same head weights side by side; the host chooses their tokens where the graph cannot.

    Returns first_layer's inputs; HAWK's scores of each prompt, float32 [num_visual], where the host has read them; and
    the seconds that it took to choose, without first_layer's. Raises InvalidInput: a caller's own selector gave
    something else than k of the candidates.
    """
    layouts = [layout for layout, _ in prompts]
    weights = weights_for(bundle, prompts[0][1])
    inputs = collate(layouts, [kept_count(*prompt) for prompt in prompts], [None] * len(prompts), weights)
    if all(_graph_chooses(*prompt) for prompt in prompts):
        return inputs, None, 0.0
    from hawk_trt.pruning.selectors import Candidates, Source, choose  # few prompts need them

    begun = time.perf_counter()
    source, chosen = Source(bundle, backend, layouts, inputs, visual), []
    for row, (layout, pruning) in enumerate(prompts):
        rng, kept = np.random.default_rng(pruning.seed), np.zeros(layout.num_visual, np.bool_)
        for pool in _pools(layout, pruning):
            kept[pool[choose(Candidates(pool, rng, source, row), _limit(pool, pruning), pruning)]] = True
        chosen.append(kept)
    inputs = collate(layouts, [int(kept.sum()) for kept in chosen], chosen, weights)
    scores = None if source.score_seconds is None else source.scores
    return inputs, scores, time.perf_counter() - begun - (source.score_seconds or 0.0)


def _graph_chooses(prompt: PromptLayout, pruning: PruningConfig) -> bool:
    """Whether the graph's own top-k makes the choice."""
    if pruning.keep_mass is not None and prompt.num_visual:
        return False
    if kept_count(prompt, pruning) == prompt.num_visual:
        return True
    return pruning.selector in SCORED and not pruning.diversity and len(_pools(prompt, pruning)) == 1


def _limit(pool: npt.NDArray[np.int64], pruning: PruningConfig) -> int:
    return num_kept(len(pool), pruning.keep_ratio, pruning.min_visual_tokens)


def _pools(prompt: PromptLayout, pruning: PruningConfig) -> list[npt.NDArray[np.int64]]:
    """The places of the visual tokens that compete with each other, one array a pool."""
    visual = prompt.visual_rows >= 0
    if not visual.any():
        return []
    if pruning.quota == "global":
        return [np.arange(int(visual.sum()))]
    groups = (prompt.items if pruning.quota == "per-image" else prompt.frames)[visual]
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]
