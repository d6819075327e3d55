"""Answers with single heads left out, in PyTorch: the same prompt side by side, each row without another head.

    out_i = 0 for the row's head i, before o_proj          in layer 0, or in every layer

A row costs what an answer costs; image, prompt and the choice of tokens are made once for all rows. Only this file
and the parity reference import torch and transformers for a calibration.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hawk_trt.apps.calibrate.work import FIRST_LAYER
from hawk_trt.apps.parity.reference import EmbeddedPrompt, Reference
from hawk_trt.errors import InvalidInput
from hawk_trt.request import PruningConfig

try:
    import torch
    from torch import Tensor
    from transformers import DynamicCache
except ImportError as error:
    raise InvalidInput(
        f"calibrate needs torch and transformers ({error}): pip install torch transformers safetensors"
    ) from error


class AblatedModel:
    """A checkpoint's model that answers without a head."""

    def __init__(self, reference: Reference, scope: str, stop_tokens: Sequence[int]) -> None:
        """Take a loaded model.

        Args:
            reference: it.
            scope: where the head is left out, one of work.SCOPES.
            stop_tokens: ids that end an answer.
        """
        self._reference = reference
        self._model = reference.model
        language = self._model.language
        self._layers = list(language.layers)[: 1 if scope == FIRST_LAYER else None]
        self._num_heads = int(language.config.num_attention_heads)
        self._stop = frozenset(stop_tokens)

    def kept(self, prompt: EmbeddedPrompt, keep_ratio: float) -> list[int]:
        """Positions of the prompt that are kept, the same for every row: all, or HAWK's choice with equal heads."""
        if keep_ratio == 1.0:
            return list(range(len(prompt.ids)))
        equal = (1.0 / self._num_heads,) * self._num_heads
        trace = self._reference.run(prompt, PruningConfig(keep_ratio=keep_ratio, head_weights=equal))
        kept: list[int] = np.flatnonzero(np.isin(prompt.places, trace.kept_indices)).tolist()
        return kept

    @torch.inference_mode()
    def answer(
        self, prompt: EmbeddedPrompt, kept: Sequence[int], heads: Sequence[int | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer one prompt greedily, once for each head.

        Args:
            prompt: from the reference's embed.
            kept: its positions that the decoder sees, ascending.
            heads: left out of each row; None leaves out nothing.
            max_new_tokens: longest answer.

        Returns:
            Token ids of each row, without the stop token.
        """
        language, rows = self._model.language, len(heads)
        device = prompt.embeds.device
        places = torch.tensor(kept, device=device)
        embeds = prompt.embeds[places].expand(rows, -1, -1)
        positions = _positions(prompt.position_ids[:, places], rows)
        deepstack = _deepstack(prompt, kept, rows)
        following = int(prompt.position_ids.max()) + 1  # what comes next has the place that it has unpruned
        cache = DynamicCache(config=language.config)
        answers: list[list[int]] = [[] for _ in heads]
        open_rows = set(range(rows))
        with self._without(heads):
            for step in range(max_new_tokens):
                output = language(
                    inputs_embeds=embeds,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    **deepstack,
                )
                deepstack = {}  # what is generated is text
                chosen = self._model.lm_head(output.last_hidden_state[:, -1]).argmax(-1)
                for row, token in enumerate(chosen.tolist()):
                    if token in self._stop:
                        open_rows.discard(row)
                    elif row in open_rows:
                        answers[row].append(token)
                if not open_rows:
                    break
                embeds = language.embed_tokens(chosen)[:, None]
                place = torch.full((len(prompt.position_ids), 1), following + step, device=device)
                positions = _positions(place, rows)
        return answers

    @contextmanager
    def _without(self, heads: Sequence[int | None]) -> Iterator[None]:
        """Zero what each row's head hands to o_proj."""
        hooks = []
        try:
            for layer in self._layers:
                projection = layer.self_attn.o_proj
                size = projection.in_features // self._num_heads
                dropped = torch.zeros(len(heads), 1, projection.in_features, dtype=torch.bool)
                for row, head in enumerate(heads):
                    if head is not None:
                        dropped[row, :, head * size : (head + 1) * size] = True
                hooks.append(projection.register_forward_pre_hook(_zeroing(dropped.to(projection.weight.device))))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _zeroing(dropped: Tensor) -> Any:  # noqa: ANN401 - a hook of torch
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(dropped, 0.0), *inputs[1:])

    return hook


def _positions(positions: Tensor, rows: int) -> Tensor:
    """Positions [axes, n] of every row; a model of one axis takes none: [rows, n]."""
    return positions[:, None].expand(-1, rows, -1) if len(positions) > 1 else positions.expand(rows, -1)


def _deepstack(prompt: EmbeddedPrompt, kept: Sequence[int], rows: int) -> dict[str, Any]:
    """What a model with DeepStack takes besides, of every row; nothing for others."""
    if not prompt.deepstack:
        return {}
    visual, still_there = set(prompt.visual), set(kept)
    ordinals = [n for n, position in enumerate(prompt.visual) if position in still_there]
    mask = torch.tensor([[position in visual for position in kept]], device=prompt.embeds.device)
    return {
        "visual_pos_masks": mask.expand(rows, -1),
        "deepstack_visual_embeds": [level[ordinals].repeat(rows, 1) for level in prompt.deepstack],
    }
