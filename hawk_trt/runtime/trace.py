"""Trace: what every stage makes of one prompt and given tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.request import ModelInputs, PruningConfig, Request
from hawk_trt.runtime.protocol import Generation
from hawk_trt.runtime.vision_cache import VisionCache
from hawk_trt.scheduler import Scheduler
from hawk_trt.sequence import Sampler
from hawk_trt.stages import LanguageConfig


@dataclass(frozen=True, slots=True)
class Trace:
    """Every stage's output for one prompt and given tokens, for comparison with a reference.

    Attributes:
        visual_embeds: [num_visual, hidden], in prompt order.
        scores: [num_visual].
        kept_indices: [kept], in the prompt as given.
        hidden_states: [kept, hidden], first_layer's output.
        kv_norms: [layers, 2, columns], lengths of the keys and the values of each column; of a linear layer the lengths
            of its two states, the same in all columns.
        logits: [steps, vocab]; row 0 after the prompt, row i after token i.
    """

    visual_embeds: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    kept_indices: npt.NDArray[np.int64]
    hidden_states: npt.NDArray[np.float32]
    kv_norms: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


class ForcedSampler(Sampler):
    """Gives tokens that are known already, then the most probable ones."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self._tokens = iter(tokens)

    def next_token(self, logits: npt.NDArray[np.float32]) -> int:
        """The next of the tokens."""
        token = next(self._tokens, None)
        return int(np.argmax(logits)) if token is None else token


def trace(
    scheduler: Scheduler,
    vision: VisionCache,
    language: LanguageConfig,
    inputs: ModelInputs,
    pruning: PruningConfig,
    forced_tokens: Sequence[int],
    steps: int | None,
) -> Trace:
    """Run one prompt and keep what every stage made; see Pipeline.trace."""
    steps = len(forced_tokens) + 1 if steps is None else steps
    request = Request(inputs, pruning=pruning, max_new_tokens=steps + 1, ignore_eos=True, return_logits=True)
    sequence = scheduler.add(request)
    sequence.sampler = ForcedSampler(forced_tokens)
    rows = sequence.layout.visual_rows
    embeds = vision.encode([(inputs, sequence.layout)])[0].numpy().astype(np.float32)[rows[rows >= 0]]

    def step() -> Generation:
        scheduler.step()
        if sequence.error is not None:
            raise sequence.error
        assert sequence.generation is not None  # there is a token more to come
        return sequence.generation

    generation = step()
    hidden = generation.hidden_states()[0]
    for _ in range(steps - 1):
        generation = step()
    norms = []
    for layer in range(language.num_hidden_layers):
        parts = [part[0].astype(np.float32) for part in generation.cache(layer)]
        if language.is_linear(layer):
            norms.append([np.full(sequence.columns, np.linalg.norm(part), np.float32) for part in parts])
        else:
            norms.append([np.sqrt(np.einsum("hcd,hcd->c", part, part)) for part in parts])
    result = sequence.result()
    assert result.logits is not None
    return Trace(embeds, result.scores, result.kept_indices, hidden, np.array(norms), result.logits)
