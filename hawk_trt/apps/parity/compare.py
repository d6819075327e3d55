"""The outputs of both sides -> rows of numbers, each with what is wrong with it.

A selection row holds the kept set and the scores behind it; a token row the teacher-forced distribution and the
free-running tokens. Rows of stages are of hawk_trt.runtime.comparison. Numpy in float64 only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hawk_trt.runtime.comparison import Tolerance, at_most
from hawk_trt.runtime.trace import Trace

_NAN = float("nan")
_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReferenceTrace:
    """Every stage's output of the PyTorch reference; seq_len and position_ids leave out masked positions."""

    visual_embeds: _Floats  # [num_visual, hidden], in prompt order
    inputs_embeds: _Floats  # [seq_len, hidden], text and visual, before layer 0
    head_scores: _Floats  # [heads, num_visual], raw, before normalisation
    scores: _Floats  # [num_visual], what ranks the visual tokens
    visual_indices: _Ints  # [num_visual], their positions in the prompt as given
    topk_groups: _Ints  # [num_visual], tokens with the same number competed in one top-k
    kept_visual: _Ints  # [num_kept], ordinals of the kept ones among the visual tokens, ascending
    kept_indices: _Ints  # [kept], text and visual positions kept, in the prompt as given, ascending
    query_indices: _Ints  # [query], in the prompt as given; empty without visual tokens
    hidden_states: _Floats  # [kept, hidden], output of layer 0
    position_ids: _Ints  # [axes, seq_len]
    kept_position_ids: _Ints  # [axes, kept]
    logits: _Floats  # [steps, vocab]; row i is what tokens[i] was chosen from, or forced after
    tokens: tuple[int, ...]  # the greedy choices, or the tokens forced


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """The kept set against the reference's."""

    num_visual: int
    num_kept: int  # visual tokens that the reference keeps
    overlap: float  # share of them that the bundle keeps too
    # The reference's last kept score - its first dropped one, the least over all top-ks; None where nothing is dropped.
    margin: float | None
    # How far from the cut a wrongly kept or dropped token lies at most, as a share of their spread; 0: equal sets.
    swap_distance: float
    rank_correlation: float  # Spearman's, of the scores
    score_error: float  # largest absolute difference of a score
    score_error_share: float  # without a shift common to all, as a share of the spread
    failures: tuple[str, ...]  # what is out of tolerance


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Teacher-forced distributions and free-running tokens against the reference's."""

    steps: int  # decode steps compared, the prefill's among them
    argmax_agreement: float  # share of steps whose most probable token is the same
    kl: float  # largest KL(reference || bundle) of a step, in nats
    tokens_equal: bool  # the bundle's own greedy tokens are the reference's
    first_difference: int | None  # the step where they part
    # The reference's best logit - its logit of the bundle's token there, as a share of its largest; 0 for equal tokens.
    margin_there: float
    failures: tuple[str, ...]  # what is out of tolerance


def compare_selection(trace: Trace, reference: ReferenceTrace, tolerance: Tolerance) -> SelectionRow:
    """Compare what is kept, and the scores that decided it; the reference made its own choice among visual tokens."""
    expected, got = reference.scores.astype(np.float64), np.asarray(trace.scores, dtype=np.float64)
    num_visual, num_kept = len(expected), len(reference.kept_visual)
    if got.shape != expected.shape:
        wrong = f"scores: got {got.shape}, expected {expected.shape}"
        return SelectionRow(num_visual, num_kept, 0.0, None, _NAN, _NAN, _NAN, _NAN, (wrong,))
    # Where all scores are alike, their differences are rounding: 1 % of the largest counts as spread.
    spread = max(float(np.ptp(expected)), 0.01 * float(np.abs(expected).max()))
    error = got - expected
    # Kept or dropped does not depend on a shift of all scores, so it is no error here.
    error_share = _share(float(np.abs(error - np.median(error)).max()), spread)
    failures = at_most("score error", error_share, tolerance.score_error)

    kept = np.isin(np.arange(num_visual), reference.kept_visual)
    got_kept = np.isin(reference.visual_indices, trace.kept_indices)
    margins, distances = [], [0.0]
    for group in np.unique(reference.topk_groups):
        member = reference.topk_groups == group
        count, got_count = np.count_nonzero(member & kept), np.count_nonzero(member & got_kept)
        if count != got_count:
            failures += (f"kept {got_count} of a top-{count}",)
        if count == 0 or count == np.count_nonzero(member):
            continue
        last_kept, first_dropped = expected[member & kept].min(), expected[member & ~kept].max()
        margins.append(float(last_kept - first_dropped))
        swapped = expected[member & (kept != got_kept)]
        distances += [_share(abs(float(s) - float(last_kept + first_dropped) / 2), spread) for s in swapped]
    failures += at_most("distance of a swapped token from the cut", max(distances), tolerance.score_error)
    text = np.setdiff1d(reference.kept_indices, reference.visual_indices)
    if not np.array_equal(trace.kept_indices, np.union1d(text, reference.visual_indices[got_kept])):
        failures += ("kept_indices: not all text and the kept visual tokens in ascending order",)
    return SelectionRow(
        num_visual,
        num_kept,
        overlap=float((kept & got_kept).sum() / max(num_kept, 1)),
        margin=min(margins) if margins else None,
        swap_distance=max(distances),
        rank_correlation=rank_correlation(got, expected),
        score_error=float(np.abs(error).max()),
        score_error_share=error_share,
        failures=failures,
    )


def compare_tokens(tokens: Sequence[int], trace: Trace, reference: ReferenceTrace, tolerance: Tolerance) -> TokenRow:
    """Compare teacher-forced logits [steps, vocab] and free-running tokens.

    Both sides were forced to the tokens that the bundle chose when running freely, so up to their first difference the
    reference's most probable tokens are its own free-running ones.
    """
    expected, got = reference.logits.astype(np.float64), np.asarray(trace.logits, dtype=np.float64)
    if got.shape != expected.shape or len(tokens) != len(expected):
        wrong = f"logits: got {got.shape} and {len(tokens)} tokens, expected {expected.shape}"
        return TokenRow(len(expected), 0.0, _NAN, False, 0, _NAN, (wrong,))
    with np.errstate(invalid="ignore"):  # infinities become NaN, and NaN fails
        log_p, log_q = _log_softmax(expected), _log_softmax(got)
        kl = float((np.exp(log_p) * (log_p - log_q)).sum(1).max())
    best = expected.argmax(1)
    different = np.flatnonzero(best != np.asarray(tokens))
    first, margin = None, 0.0
    if len(different):
        first = int(different[0])
        margin = _share(float(expected[first].max() - expected[first, tokens[first]]), float(np.abs(expected).max()))
    # Two logits that are each off by the largest error allowed can change places when twice that apart.
    limit = 2 * tolerance.decoder.max_error
    failures = at_most("KL", kl, tolerance.kl) + at_most("margin of the token chosen otherwise", margin, limit)
    agreement = float((best == got.argmax(1)).mean())
    return TokenRow(len(expected), agreement, kl, first is None, first, margin, failures)


def rank_correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation; equal values share their mean rank, and two constants agree."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if 0.0 in (np.ptp(ranks[0]), np.ptp(ranks[1])):
        return float(np.array_equal(ranks[0], ranks[1]))
    return float(np.asarray(np.corrcoef(ranks[0], ranks[1]))[0, 1])


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _share(value: float, whole: float) -> float:
    """Value / whole; no error is no error where all of the whole is one value."""
    return value / whole if whole else (0.0 if value == 0.0 else float("inf"))
