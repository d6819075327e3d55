"""Random inputs of the rule, and what an implementation's answer lacks against the numpy oracle."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.gpu_report.topk_library import Sizes
from hawk_trt.pruning import hawk
from hawk_trt.stages import BIAS_DROP, BIAS_KEEP

# Float32 sums in another order: measured up to 4e-7 of the largest score, on 28 heads and up to 65,536 positions.
SCORE_TOLERANCE = 2e-6


@dataclass(frozen=True, slots=True)
class Case:
    """One call's inputs."""

    head_scores: npt.NDArray[np.float32]  # (batch, heads, seq_len) float32
    head_weights: npt.NDArray[np.float32]  # (heads) float32
    visual_rows: npt.NDArray[np.int64]  # (batch, seq_len) int64
    select_bias: npt.NDArray[np.float32]  # (batch, seq_len) float32
    num_kept: int  # positions to keep of a row

    @property
    def sizes(self) -> Sizes:
        """Of the call."""
        batch, heads, seq_len = self.head_scores.shape
        return Sizes(batch, heads, seq_len, self.num_kept)


def random_case(
    seed: int,
    sizes: Sizes,
    *,
    ties: bool = False,
    broken: bool = False,
    small_bias: bool = False,
) -> Case:
    """Inputs as the host lays them out: padding first, text kept whatever its score, visual tokens competing.

    Args:
        seed: of all that is random.
        sizes: of the call; num_kept need not suit the kept text.
        ties: few different scores.
        broken: a tenth of the scores NaN or infinite.
        small_bias: biases that add to the scores, beside those that decide.
    """
    random = np.random.default_rng(seed)
    shape = (sizes.batch, sizes.seq_len)
    scores = random.normal(0, 3, (sizes.batch, sizes.heads, sizes.seq_len)).astype(np.float32)
    weights = random.random(sizes.heads).astype(np.float32)
    if ties:
        scores = np.round(scores / 3)
        weights = (np.round(4 * weights) / 4).astype(np.float32)
    if broken:
        bad = random.random(scores.shape) < 0.1
        scores[bad] = random.choice(np.array([np.nan, np.inf, -np.inf], np.float32), int(bad.sum()))
    rows = np.where(random.random(shape) < 0.7, np.arange(sizes.seq_len), -1).astype(np.int64)
    bias = np.where(rows >= 0, 0.0, BIAS_KEEP).astype(np.float32)
    if small_bias:
        bias[rows >= 0] = random.choice(np.array([0.0, -0.0, 0.25, -0.5], np.float32), int((rows >= 0).sum()))
    for row, padding in enumerate(random.integers(0, sizes.seq_len // 4 + 1, sizes.batch)):
        bias[row, :padding], rows[row, :padding] = BIAS_DROP, -1
    return Case(scores, weights, rows, bias, sizes.num_kept)


def disagreement(
    case: Case,
    normalization: str,
    kept_indices: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float32],
) -> str | None:
    """What is wrong with an answer, or None.

    The scores must be the oracle's but for the order of sums. The kept indices must be exactly those of a stable
    sort of these very scores, whatever their last bits; and the oracle's own wherever its cut is clear.
    """
    expected_kept, expected_scores = hawk.weighted_topk(
        case.head_scores, case.head_weights, case.visual_rows, case.select_bias, case.num_kept, normalization
    )
    unit = max(float(np.abs(expected_scores).max(initial=0.0)), 1e-30)
    error = float(np.abs(scores - expected_scores).max(initial=0.0)) / unit
    if not error <= SCORE_TOLERANCE:
        return f"scores differ by {error:.1e} of the largest, expected at most {SCORE_TOLERANCE:.0e}"
    keys = -hawk.weighted_topk_keys(scores, case.select_bias)
    own = np.sort(np.argsort(keys, axis=-1, kind="stable")[:, : case.num_kept], axis=-1)
    if not np.array_equal(kept_indices, own):
        row, slot = np.argwhere(kept_indices != own)[0]
        return f"row {row}, slot {slot}: kept {kept_indices[row, slot]}, expected {own[row, slot]}"
    ordered = np.sort(-hawk.weighted_topk_keys(expected_scores, case.select_bias), axis=-1)
    for row in range(len(ordered)):
        cut = case.num_kept
        clear = cut in (0, ordered.shape[1]) or ordered[row, cut] - ordered[row, cut - 1] > 2 * SCORE_TOLERANCE * unit
        if clear and not np.array_equal(kept_indices[row], expected_kept[row]):
            return f"row {row}: other positions than the oracle's, with a clear cut"
    return None
