"""Everything that the stages make of one prompt, whichever backend runs them: what the check after a build compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.inputs.layout import collate
from hawk_trt.pipeline import Pipeline
from hawk_trt.pruning.selection import kept_count
from hawk_trt.request import ModelInputs, PruningConfig
from hawk_trt.runtime.protocol import DecodeInputs

STEPS = 8
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StageTrace:
    """What every stage made of one prompt.

    Attributes:
        visual_embeds: float32 [num_visual, hidden].
        scores: float32 [num_visual].
        kept: bool [num_visual].
        hidden_states: float32 [kept, hidden], first_layer's output.
        caches: float32 [columns, 2 * kv_heads * head_dim] of each layer, keys and values.
        logits: float32 [steps, vocab].
    """

    visual_embeds: Floats
    scores: Floats
    kept: npt.NDArray[np.bool_]
    hidden_states: Floats
    caches: tuple[Floats, ...]
    logits: Floats

    @property
    def tokens(self) -> list[int]:
        """The most probable token of each step."""
        return [int(token) for token in self.logits.argmax(1)]


def trace(
    pipe: Pipeline, inputs: ModelInputs, forced: Sequence[int] | None, chosen: npt.NDArray[np.bool_] | None = None
) -> StageTrace:
    """Run one prompt and keep what every stage made.

    Args:
        pipe: a loaded bundle or engine folder.
        inputs: the prompt.
        forced: tokens decoded one after another; None decodes the most probable ones.
        chosen: bool [num_visual], the visual tokens kept; None lets the scores choose.
    """
    manifest = pipe.bundle.manifest
    layout = pipe.layout(inputs)
    pruning = PruningConfig(keep_ratio=manifest.keep_ratio)
    weights = np.array(manifest.head_weights.values, np.float32)
    prompt = collate([layout], [kept_count(layout, pruning)], [chosen], weights)
    visual = pipe.encode([inputs], [layout])
    generation = pipe.backend.start(1, prompt.num_kept_total + STEPS)
    outputs = generation.prefill(prompt, visual, logits=True)
    hidden = generation.hidden_states()[0]
    steps = [outputs.step]
    for number in range(STEPS - 1):
        token = int(steps[-1].next_token[0]) if forced is None else forced[number]
        position = np.array([layout.next_position + number], np.int64)
        steps.append(generation.decode(DecodeInputs(np.array([token], np.int64), position), logits=True))
    kept_rows = layout.visual_rows[outputs.kept_indices[0] - prompt.pads[0]]
    rows = layout.visual_rows[layout.visual_rows >= 0]
    return StageTrace(
        visual_embeds=visual.numpy().astype(np.float32)[rows],
        scores=outputs.scores[0, prompt.pads[0] :][layout.visual_rows >= 0],
        kept=np.isin(rows, kept_rows),
        hidden_states=hidden,
        caches=tuple(
            np.concatenate([_columns(part) for part in generation.cache(layer)], axis=1)
            for layer in range(manifest.language.num_hidden_layers)
        ),
        logits=np.concatenate([step.logits for step in steps if step.logits is not None]),
    )


def _columns(cache: npt.NDArray[Any]) -> Floats:
    """[1, kv_heads, columns, head_dim] -> float32 [columns, kv_heads * head_dim]."""
    columns: Floats = cache[0].transpose(1, 0, 2).reshape(cache.shape[2], -1).astype(np.float32)
    return columns
