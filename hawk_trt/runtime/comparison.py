"""How near two runs of a stage are, and how near they must be for a dtype and a format of the weights.

Cosine is blind to scale and a norm ratio to direction, so both are gated. Errors are relative to the
largest value of the reference: a large model's outliers would make an absolute number meaningless.

Measured on the worst row of the worst of 72 to 120 runs each (images, videos, text; keep ratios 0.1 to 1; 16
steps), first on the trained tiny model, then on a random one, whose decoder amplifies every error. float32 and
float16: ONNX Runtime's CPU against PyTorch in float32. bfloat16: PyTorch in bfloat16 against a float32 bundle,
since ONNX Runtime's CPU cannot run it; there the random model is beyond the decoder's limits in half of the runs.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import Manifest


@dataclass(frozen=True, slots=True)
class StageTolerance:
    """Of one stage's output: the least cosine of a row, and the most of the others.

    norm_ratio: of |got| / |expected| of a row to 1.  max_error: of a value, as a share of the largest reference value.
    """

    cosine: float
    norm_ratio: float
    max_error: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Of one dtype. All scores of a prompt are one row; the decoder's rows are the teacher-forced logits.

    score_error: the most that a score may differ, a shift common to all left out, as a share of the reference's spread
    (largest - smallest score). A kept token may be swapped for another only where both lie this near to the cut.
    kl: the most that the next-token distribution may differ, in nats.
    """

    vision: StageTolerance
    scores: StageTolerance
    first_layer: StageTolerance
    decoder: StageTolerance
    score_error: float
    kl: float


# Beside each: 1 - cosine, norm ratio - 1, error; measured on the trained | the random model.
TOLERANCES = {
    "float32": Tolerance(
        vision=StageTolerance(0.999999, 1e-5, 3e-5),  # 1e-12, 6e-7, 1e-6 | 2e-11, 1e-6, 4e-6
        scores=StageTolerance(0.999999, 1e-5, 3e-5),  # 5e-13, 2e-7, 1e-6 | 3e-12, 6e-7, 3e-6
        first_layer=StageTolerance(0.999999, 5e-5, 5e-5),  # 1e-12, 1e-6, 9e-7 | 1e-10, 6e-6, 9e-6
        decoder=StageTolerance(0.999999, 5e-5, 1e-4),  # 7e-14, 1e-6, 2e-6 | 4e-10, 4e-6, 2e-5
        score_error=2e-5,  # 1e-6 | 2e-6; no token was swapped
        kl=1e-7,  # 1e-10 | 2e-9
    ),
    "float16": Tolerance(
        vision=StageTolerance(0.9999, 3e-3, 8e-3),  # 4e-7, 4e-4, 7e-4 | 4e-6, 1e-3, 3e-3
        scores=StageTolerance(0.9999, 2e-3, 1e-2),  # 1e-7, 8e-5, 8e-4 | 2e-6, 6e-4, 3e-3
        first_layer=StageTolerance(0.9998, 1e-2, 2e-2),  # 4e-7, 6e-4, 3e-4 | 4e-5, 3e-3, 6e-3
        decoder=StageTolerance(0.999, 1e-2, 5e-2),  # 1e-8, 9e-4, 8e-4 | 4e-4, 4e-3, 2e-2
        score_error=5e-3,  # 4e-4 | 1.5e-3; swaps at 4e-5 | 2e-4 from the cut
        kl=1e-2,  # 1e-5 | 2e-3
    ),
    "bfloat16": Tolerance(
        vision=StageTolerance(0.998, 2e-2, 4e-2),  # 1.5e-4, 6e-3, 8e-3 | 7e-4, 9e-3, 2e-2
        scores=StageTolerance(0.999, 1e-2, 8e-2),  # 3e-5, 2e-3, 1e-2 | 4e-4, 4e-3, 4e-2
        first_layer=StageTolerance(0.995, 5e-2, 8e-2),  # 1.2e-4, 1.1e-2, 9e-3 | 3e-3, 3e-2, 6e-2
        decoder=StageTolerance(0.99, 4e-2, 0.1),  # 3e-6, 1e-2, 1.2e-2 | 3e-2, 3e-2, 0.19
        score_error=3e-2,  # 6e-3 | 2e-2; swaps at 1.3e-3 | 5e-3 from the cut
        kl=0.1,  # 8e-3 | 0.12
    ),
}

# Of quantised weights, by their bits: what int8 and int4 cost, in the worst of blocks of 32 to 128. Vision, scores and
# kept set are the dtype's. On the random model int4 is beyond the decoder's limits: there is no direction to keep.
# first_layer, decoder, KL
_QUANTISED = {
    8: (
        StageTolerance(0.995, 4e-2, 8e-2),  # 2e-4, 9e-3, 1.5e-2 | 7e-4, 1e-2, 2.8e-2
        StageTolerance(0.95, 6e-2, 0.3),  # 1e-5, 3e-2, 2e-2 | 2.4e-2, 2.1e-2, 0.19
        0.4,  # 8e-3 | 0.22
    ),
    4: (
        StageTolerance(0.85, 0.4, 0.5),  # 1.6e-2, 0.16, 0.16 | 7e-2, 0.11, 0.28
        StageTolerance(0.95, 0.6, 0.5),  # 1.3e-3, 0.32, 0.25 | 0.51, 0.13, 0.99
        2.5,  # 1.3 | 4.1
    ),
}


# A hybrid model's first_layer runs several layers over all tokens, whose states carry every rounding on, and its scores
# are made behind them. Errors of scores and first_layer, and the score error, of 5 prompts on a trained tiny one | on a
# random one: float32 1e-6, 2e-6, 8e-7 | 4e-5, 4e-5, 2e-5; float16 6e-4, 5e-4, 4e-4 | 1.5e-2, 1.5e-2, 9e-3; int8 1e-2,
# 1e-2, 9e-3 | beyond the limits.
_HYBRID = 4.0


def tolerance_of(manifest: Manifest) -> Tolerance:
    """What a bundle may differ by: its dtype's, or where its weights are quantised and that is more, theirs."""
    tolerance = TOLERANCES[manifest.dtype]
    if manifest.weights is not None:
        first_layer, decoder, kl = _QUANTISED[manifest.weights.bits]
        tolerance = replace(
            tolerance,
            first_layer=_looser(tolerance.first_layer, first_layer),
            decoder=_looser(tolerance.decoder, decoder),
            kl=max(tolerance.kl, kl),
        )
    if manifest.language.linear is None:
        return tolerance
    one = tolerance.first_layer
    wide = StageTolerance(1 - _HYBRID * (1 - one.cosine), _HYBRID * one.norm_ratio, _HYBRID * one.max_error)
    score_error = max(tolerance.score_error, one.max_error)
    return replace(tolerance, scores=_looser(tolerance.scores, wide), first_layer=wide, score_error=score_error)


def _looser(one: StageTolerance, other: StageTolerance) -> StageTolerance:
    errors = (max(one.norm_ratio, other.norm_ratio), max(one.max_error, other.max_error))
    return StageTolerance(min(one.cosine, other.cosine), *errors)


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage's output against the reference's.

    rows: vectors compared: visual tokens, kept tokens or decode steps.  cosine, norm_ratio: means over the rows;
    |got| / |expected|.  norm_ratio_worst: the one farthest from 1.  max_error_share: as a share of the largest
    reference value.  failures: what is out of tolerance.
    """

    stage: str
    rows: int
    cosine: float
    cosine_min: float
    norm_ratio: float
    norm_ratio_worst: float
    max_error: float
    max_error_share: float
    failures: tuple[str, ...]


def compare_stage(stage: str, got: npt.ArrayLike, expected: npt.ArrayLike, tolerance: StageTolerance) -> StageRow:
    """Compare two float arrays [rows, values]."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    nan = float("nan")
    if a.shape != b.shape:
        return StageRow(stage, len(b), nan, nan, nan, nan, nan, nan, (f"shape: got {a.shape}, expected {b.shape}",))
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both_zero = (norm_a == 0) & (norm_b == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(both_zero, 1.0, (a * b).sum(1) / (norm_a * norm_b))
        ratio = np.where(both_zero, 1.0, norm_a / norm_b)
        error = float(np.abs(a - b).max())
        share = error / float(np.abs(b).max()) if error else 0.0
    worst = float(ratio[np.argmax(np.abs(ratio - 1.0))])  # argmax takes a NaN first
    failures = (
        at_least("cosine", float(cosine.min()), tolerance.cosine)
        + at_most("norm ratio - 1", abs(worst - 1.0), tolerance.norm_ratio)
        + at_most("max error", share, tolerance.max_error)
    )
    return StageRow(
        stage, len(b), float(cosine.mean()), float(cosine.min()), float(ratio.mean()), worst, error, share, failures
    )


def at_least(name: str, value: float, limit: float) -> tuple[str, ...]:
    """A failure where a value is below its limit, or NaN."""
    return () if value >= limit else (f"{name} {value:.6g}, expected at least {limit:g}",)


def at_most(name: str, value: float, limit: float) -> tuple[str, ...]:
    """A failure where a value is above its limit, or NaN."""
    return () if value <= limit else (f"{name} {value:.3g}, expected at most {limit:g}",)
