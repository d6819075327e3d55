"""Heads that say what a visual token shows; thrown away after the first stage."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.tiny_task.glyphs import COLOURS, GLYPHS
from examples.tiny_training.lessons import CellLabels

_SMOOTHING = 0.1
_EMPTY_WEIGHT = 0.25  # of a token that shows no glyph, since most show none
_QUARTER_WEIGHT = 0.5


class CellHeads(nn.Module):
    """One linear layer, read as glyph, colour and quarter of the picture."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self._sizes = (1 + len(GLYPHS), 1 + len(COLOURS), 4)
        self._read = nn.Linear(hidden, sum(self._sizes))

    def loss(self, visual: Tensor, labels: CellLabels) -> Tensor:
        """Cross-entropy of the three: visual [pictures, num_visual, hidden]."""
        glyphs, colours, quarters = (part.flatten(0, 1) for part in self._logits(visual))
        glyph = labels.glyph.flatten()
        weight = torch.where(glyph > 0, 1.0, _EMPTY_WEIGHT)
        named = functional.cross_entropy(glyphs, glyph, reduction="none", label_smoothing=_SMOOTHING)
        named = named + functional.cross_entropy(
            colours, labels.colour.flatten(), reduction="none", label_smoothing=_SMOOTHING
        )
        placed = functional.cross_entropy(quarters, labels.quarter.flatten(), label_smoothing=_SMOOTHING)
        return (named * weight).sum() / weight.sum() + _QUARTER_WEIGHT * placed

    @torch.no_grad()
    def right(self, visual: Tensor, labels: CellLabels) -> tuple[float, float, float]:
        """Share of right glyphs and colours where there is one, and of right quarters."""
        glyph, colour, quarter = (part.argmax(-1) for part in self._logits(visual))
        there = labels.glyph > 0
        return (
            float((glyph == labels.glyph)[there].float().mean()),
            float((colour == labels.colour)[there].float().mean()),
            float((quarter == labels.quarter).float().mean()),
        )

    def _logits(self, visual: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._read(visual.float()).split(self._sizes, dim=-1))
