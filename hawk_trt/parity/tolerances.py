"""What parity may differ by, a dtype of the bundle, with what was measured beside each.

Cosine is blind to scale and a norm ratio to direction, so both are gated. Errors are relative to the
largest value of the reference: a large model's outliers would make an absolute number meaningless.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTolerance:
    """Of one stage's output, row by row.

    Attributes:
        cosine: the least that any row's cosine may be.
        norm_ratio: the most that any row's |got| / |expected| may differ from 1.
        max_error: the most that any value may differ, as a share of the largest reference value.
    """

    cosine: float
    norm_ratio: float
    max_error: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Of one dtype.

    Attributes:
        vision: of visual_embeds.
        scores: of all scores of a prompt as one row.
        first_layer: of layer 0's output.
        decoder: of the teacher-forced logits.
        score_error: the most that a score may differ, a shift common to all left out, as a share of the
            reference's spread (largest - smallest score). A kept token may be swapped for another only
            where both lie this near to the cut.
        kl: the most that the next-token distribution may differ, in nats.
    """

    vision: StageTolerance
    scores: StageTolerance
    first_layer: StageTolerance
    decoder: StageTolerance
    score_error: float
    kl: float


TOLERANCES = {
    "float32": Tolerance(
        vision=StageTolerance(cosine=0.99999, norm_ratio=1e-4, max_error=1e-4),
        scores=StageTolerance(cosine=0.99999, norm_ratio=1e-4, max_error=1e-4),
        first_layer=StageTolerance(cosine=0.99999, norm_ratio=1e-4, max_error=1e-4),
        decoder=StageTolerance(cosine=0.99999, norm_ratio=1e-4, max_error=1e-4),
        score_error=1e-4,
        kl=1e-5,
    ),
    "float16": Tolerance(
        vision=StageTolerance(cosine=0.999, norm_ratio=1e-2, max_error=1e-2),
        scores=StageTolerance(cosine=0.999, norm_ratio=1e-2, max_error=2e-2),
        first_layer=StageTolerance(cosine=0.999, norm_ratio=1e-2, max_error=1e-2),
        decoder=StageTolerance(cosine=0.999, norm_ratio=2e-2, max_error=2e-2),
        score_error=2e-2,
        kl=1e-2,
    ),
    "bfloat16": Tolerance(
        vision=StageTolerance(cosine=0.99, norm_ratio=5e-2, max_error=5e-2),
        scores=StageTolerance(cosine=0.99, norm_ratio=5e-2, max_error=0.1),
        first_layer=StageTolerance(cosine=0.99, norm_ratio=5e-2, max_error=5e-2),
        decoder=StageTolerance(cosine=0.99, norm_ratio=5e-2, max_error=0.1),
        score_error=0.1,
        kl=0.1,
    ),
}
