"""Selectors: who chooses the visual tokens that are kept.

hawk          HAWK's scores, each head by its weight
uniform       HAWK's scores, all heads alike
fastv-input   the same, asked by the last prompt token instead of the question: what FastV becomes before layer 0
random        chance, by PruningConfig.seed
divprune      tokens far apart
cdpruner      tokens far apart that fit the question
dart          tokens unlike a few pivots
norm          tokens of long embeddings

The first three the graph's own top-k carries out; the others choose on the host, and the choice enters the same
graphs through select_bias. A selector is a function of Candidates and k, so a caller can give one of their own.
"""

from hawk_trt.pruning.selectors.candidates import Candidates, Selector
from hawk_trt.pruning.selectors.determinantal import by_determinant, cdpruner
from hawk_trt.pruning.selectors.diversity import by_distance, divprune
from hawk_trt.pruning.selectors.pivots import by_pivots, dart
from hawk_trt.pruning.selectors.ranking import by_chance, by_norm, by_score

__all__ = [
    "EQUAL_HEADS",
    "SCORED",
    "SELECTORS",
    "Candidates",
    "Selector",
    "cdpruner",
    "dart",
    "divprune",
]

SELECTORS: dict[str, Selector] = {
    "hawk": by_score,
    "uniform": by_score,
    "fastv-input": by_score,
    "random": by_chance,
    "divprune": by_distance,
    "cdpruner": by_determinant,
    "dart": by_pivots,
    "norm": by_norm,
}
SCORED = ("hawk", "uniform", "fastv-input")
"""Those that the graph can carry out by itself."""
EQUAL_HEADS = ("uniform", "fastv-input")
"""Those that take no head weights."""
