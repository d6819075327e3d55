"""Rows of the check after a build: what the plans made, and how far it is from what ONNX Runtime made.

In: the traces of all prompts. Out: a row an output, with the numbers of its worst prompt and what is out of tolerance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hawk_trt.apps.parity.compare import StageRow, compare_stage
from hawk_trt.apps.parity.tolerances import StageTolerance, Tolerance
from hawk_trt.stages import DECODER, FIRST_LAYER, VISION

from .stage_trace import Floats, StageTrace

# A constant score has no spread; then any distance is too far.
_LEAST_SPREAD = 1e-30


@dataclass(frozen=True, slots=True)
class VerifyRow:
    """One output over all prompts.

    Attributes:
        stage: that makes it.
        output: vision and its embeddings, scores, kept set, hidden states, KV of a layer, logits, tokens.
        prompts: that it was looked at on.
        numbers: of the worst prompt in words; empty where only finiteness was looked at.
        failures: what is wrong, each with its prompt.
    """

    stage: str
    output: str
    prompts: int
    numbers: str
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt on both sides.

    Attributes:
        name: of the prompt.
        got: of the plans.
        own: of the reference, forced to the plans' tokens, with its own choice of visual tokens.
        forced: likewise, with the plans' choice.
    """

    name: str
    got: StageTrace
    own: StageTrace
    forced: StageTrace


def finite_rows(traces: Sequence[tuple[str, StageTrace]]) -> Iterator[VerifyRow]:
    """One row a stage: all that it made is finite, and not all of it zero."""
    made: dict[str, list[tuple[str, str, Floats]]] = {VISION: [], FIRST_LAYER: [], DECODER: []}
    for name, got in traces:
        made[VISION].append((name, "visual_embeds", got.visual_embeds))
        made[FIRST_LAYER] += [(name, "scores", got.scores), (name, "hidden_states", got.hidden_states)]
        for layer, cache in enumerate(got.caches):
            made[DECODER if layer else FIRST_LAYER].append((name, f"KV of layer {layer}", cache))
        made[DECODER].append((name, "logits", got.logits))
    for stage, outputs in made.items():
        failures = []
        for name, output, values in outputs:
            bad = int(np.count_nonzero(~np.isfinite(values)))
            if bad:
                failures.append(f"{name}: {output}: {bad} of {values.size} values are not finite")
            elif values.size and not values.any():
                failures.append(f"{name}: {output}: all values are 0")
        yield VerifyRow(stage, "finite", len(traces), "", tuple(failures))


def compared_rows(prompts: Sequence[Compared], tolerance: Tolerance) -> Iterator[VerifyRow]:
    """One row an output, in the order they are made.

    Args:
        prompts: at least one.
        tolerance: of the dtype.
    """
    shown = [p for p in prompts if len(p.got.scores)]
    vision = [(p.name, p.got.visual_embeds, p.own.visual_embeds) for p in shown]
    yield _row(VISION, "visual_embeds", vision, tolerance.vision)
    yield _row(
        FIRST_LAYER, "scores", [(p.name, p.got.scores[None], p.own.scores[None]) for p in shown], tolerance.scores
    )
    yield _kept_row(shown, tolerance.score_error)
    hidden = [(p.name, p.got.hidden_states, p.forced.hidden_states) for p in prompts]
    yield _row(FIRST_LAYER, "hidden_states", hidden, tolerance.first_layer)
    for layer in range(len(prompts[0].got.caches)):
        stage, limit = (DECODER, tolerance.decoder) if layer else (FIRST_LAYER, tolerance.first_layer)
        caches = [(p.name, p.got.caches[layer], p.forced.caches[layer]) for p in prompts]
        yield _row(stage, f"KV of layer {layer}", caches, limit)
    yield _row(DECODER, "logits", [(p.name, p.got.logits, p.forced.logits) for p in prompts], tolerance.decoder)
    # two logits that are each off by the largest error allowed can change places when twice that apart
    yield _token_row(prompts, 2 * tolerance.decoder.max_error)


def _row(
    stage: str, output: str, compared: Sequence[tuple[str, Floats, Floats]], tolerance: StageTolerance
) -> VerifyRow:
    rows: list[tuple[str, StageRow]] = [
        (name, compare_stage(stage, got, expected, tolerance)) for name, got, expected in compared
    ]
    if not rows:
        return VerifyRow(stage, output, 0, "", ())
    cosine = min((row.cosine_min for _, row in rows), key=_nan_first)
    error = max((row.max_error_share for _, row in rows), key=lambda value: np.inf if np.isnan(value) else value)
    failures = tuple(f"{name}: {failure}" for name, row in rows for failure in row.failures)
    return VerifyRow(stage, output, len(rows), f"cosine {cosine:.6f}, error {error:.1e} of the largest", failures)


def _kept_row(prompts: Sequence[Compared], limit: float) -> VerifyRow:
    """A token may be kept instead of another only where both lie that near to the cut, as a share of the spread."""
    swapped, farthest, failures = 0, 0.0, []
    for name, got, own in ((p.name, p.got, p.own) for p in prompts):
        if got.kept.sum() != own.kept.sum():
            failures.append(f"{name}: kept {got.kept.sum()} visual tokens, expected {own.kept.sum()}")
        different = np.flatnonzero(got.kept & ~own.kept)
        if len(different):
            cut = own.scores[own.kept].min()
            spread = max(float(np.ptp(own.scores)), _LEAST_SPREAD)
            distance = float(np.abs(own.scores[got.kept != own.kept] - cut).max()) / spread
            swapped, farthest = swapped + len(different), max(farthest, distance)
            if not distance <= limit:
                far = f"{distance:.1e} of the spread from the cut"
                failures.append(f"{name}: {len(different)} tokens swapped, up to {far}")
    numbers = f"{swapped} tokens swapped" + (f", up to {farthest:.1e} of the spread from the cut" if swapped else "")
    return VerifyRow(FIRST_LAYER, "kept set", len(prompts), numbers, tuple(failures))


def _token_row(prompts: Sequence[Compared], limit: float) -> VerifyRow:
    """Token by token; another token is allowed only where the reference's two logits are that near."""
    same = total = 0
    failures = []
    for name, got, forced in ((p.name, p.got, p.forced) for p in prompts):
        for step, (token, expected) in enumerate(zip(got.tokens, forced.tokens, strict=True)):
            total, same = total + 1, same + (token == expected)
            margin = float(forced.logits[step, expected] - forced.logits[step, token])
            if not margin <= limit * float(np.abs(forced.logits[step]).max()):
                failures.append(f"{name}: step {step}: token {token}, expected {expected} (logits {margin:.2g} apart)")
    return VerifyRow(DECODER, "tokens", len(prompts), f"{same} of {total} equal", tuple(failures))


def _nan_first(value: float) -> float:
    return -np.inf if np.isnan(value) else value
