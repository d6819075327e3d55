"""Trace: what every stage makes of one prompt and given tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hawk_trt.pipeline import Pipeline
from hawk_trt.request import ModelInputs, PruningConfig, Request
from hawk_trt.runtime.protocol import Row


@dataclass(frozen=True, slots=True)
class Trace:
    """Every stage's output for one prompt and given tokens, for comparison with a reference."""

    visual_embeds: npt.NDArray[np.float32]  # [num_visual, hidden], in prompt order
    scores: npt.NDArray[np.float32]  # [num_visual]
    kept: npt.NDArray[np.bool_]  # [num_visual]
    hidden_states: npt.NDArray[np.float32]  # [kept, hidden], first_layer's output
    # [layers, 2, columns], lengths of the keys and the values of each column; of a linear layer the lengths of its two
    # states, the same in all columns
    kv_norms: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]  # [steps], the most probable of each step
    logits: npt.NDArray[np.float32]  # [steps, ids]; row 0 after the prompt, row i after token i
    # [ids], the tokens that the logits are of: all of the vocabulary, but in a reference
    logit_ids: npt.NDArray[np.int64]
    # [kept], text and visual, in the prompt as given; a reference in a file does without
    kept_indices: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def traced(
    pipe: Pipeline,
    inputs: ModelInputs,
    pruning: PruningConfig,
    forced_tokens: Sequence[int] = (),
    steps: int | None = None,
) -> Trace:
    """Run one prompt and keep what every stage made.

    The tokens decoded are forced_tokens; where they end, the most probable ones. steps: rows of logits; None is one
    more than there are forced tokens.
    """
    scheduler, language = pipe.scheduler(), pipe.bundle.manifest.language
    steps = len(forced_tokens) + 1 if steps is None else steps
    request = Request(inputs, pruning=pruning, max_new_tokens=steps + 1, ignore_eos=True, return_logits=True)
    sequence = scheduler.add(request)
    known = iter(forced_tokens)

    def forced(logits: npt.NDArray[np.float32]) -> int:
        token = next(known, None)
        return int(np.argmax(logits)) if token is None else token

    sequence.sampler = forced
    visual = sequence.layout.visual_rows >= 0
    embeds = pipe.vision_cache.encode([(inputs, sequence.layout)])[0].numpy().astype(np.float32)

    def step() -> Row:
        scheduler.step()
        if sequence.error is not None:
            raise sequence.error
        assert sequence.row is not None  # there is a token more to come
        return sequence.row

    row = step()
    hidden = row.hidden_states()
    for _ in range(steps - 1):
        row = step()
    norms = []
    for layer in range(language.num_hidden_layers):
        parts = [part.astype(np.float32) for part in row.cache(layer)]
        if language.is_linear(layer):
            norms.append([np.full(sequence.columns, np.linalg.norm(part), np.float32) for part in parts])
        else:
            norms.append([np.sqrt(np.einsum("hcd,hcd->c", part, part)) for part in parts])
    result = sequence.result()
    assert result.logits is not None
    return Trace(
        visual_embeds=embeds[sequence.layout.visual_rows[visual]],
        scores=result.scores,
        kept=np.isin(sequence.layout.source_index[visual], result.kept_indices),
        kept_indices=result.kept_indices,
        hidden_states=hidden,
        kv_norms=np.array(norms),
        tokens=result.logits.argmax(1),
        logits=result.logits,
        logit_ids=np.arange(result.logits.shape[1]),
    )
