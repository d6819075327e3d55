"""The check of every stage right after a build: the plans against ONNX Runtime, on prompts made for it.

In: an engine folder and the bundle, or a float32 bundle of the same checkpoint where ONNX Runtime's CPU cannot run the
dtype. Out: a row a stage: whether all is finite, and the numbers of the worst prompt; and in words what was not
compared. Both sides are forced to the same tokens, and the reference to the plans' choice of visual tokens where that
differs (which the kept set's own row judges), so that a stage is judged by what it computes, not by what came before.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hawk_trt.apps.parity.cases import ParityCase, tensor_cases
from hawk_trt.apps.parity.tolerances import tolerance_of
from hawk_trt.bundle import Bundle
from hawk_trt.engine_folder import Limits
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.pipeline import Pipeline
from hawk_trt.pruning.selection import kept_count
from hawk_trt.request import PruningConfig

from .stage_trace import STEPS, trace
from .verify_rows import Compared, VerifyRow, compared_rows, finite_rows

_SEED = 0
_FAILURES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Verification:
    """The whole check.

    Attributes:
        reference: what the plans were compared with, None where there was nothing.
        not_compared: why, where reference is None; empty else.
        rows: of the outputs.
        passed: whether nothing failed.
    """

    reference: str | None
    not_compared: str
    rows: tuple[VerifyRow, ...]
    passed: bool

    @property
    def failures(self) -> str:
        """The first failures in one line."""
        told = [f"{row.stage}: {failure}" for row in self.rows for failure in row.failures]
        more = f" (and {len(told) - _FAILURES_SHOWN} more)" if len(told) > _FAILURES_SHOWN else ""
        return "; ".join(told[:_FAILURES_SHOWN]) + more


def verify(engines: Path, bundle: Bundle, reference: Path | None, limits: Limits) -> Verification:
    """Run and compare the plans of a folder.

    Args:
        engines: the folder.
        bundle: that they were built from.
        reference: a float32 bundle of the same checkpoint, None to take `bundle` where ONNX Runtime can run it.
        limits: of the engines; larger prompts are left out.

    Raises:
        HawkError: the plans or the reference cannot be loaded or run.
    """
    against = reference_folder(bundle, reference)
    with Pipeline.load(engines, backend="tensorrt", device="cuda") as plans:
        cases = [case for case in tensor_cases(bundle.manifest, _SEED) if _fits(plans, case, limits)]
        if not cases:
            return Verification(None, "the limits are smaller than any prompt of the check: nothing was run", (), True)
        if against is None:
            rows = tuple(finite_rows([(case.name, trace(plans, case.inputs, None)) for case in cases]))
            why = (
                f"ONNX Runtime's CPU cannot run {bundle.manifest.dtype}, so numbers were not compared. Export the same "
                "checkpoint in float32 and give it with --reference"
            )
            return Verification(None, why, rows, not any(row.failures for row in rows))
        with Pipeline.load(against) as other:
            prompts = [_compared(plans, other, case) for case in cases]
    finite = finite_rows([(prompt.name, prompt.got) for prompt in prompts])
    rows = (*finite, *compared_rows(prompts, tolerance_of(bundle.manifest)))
    name = f"{against} in ONNX Runtime on the CPU"
    return Verification(name, "", rows, not any(row.failures for row in rows))


def _compared(plans: Pipeline, other: Pipeline, case: ParityCase) -> Compared:
    """One prompt through both."""
    got = trace(plans, case.inputs, None)
    own = trace(other, case.inputs, got.tokens)
    forced = own if np.array_equal(own.kept, got.kept) else trace(other, case.inputs, got.tokens, got.kept)
    return Compared(case.name, got, own, forced)


def reference_folder(bundle: Bundle, reference: Path | None) -> Path | None:
    """The bundle to compare with, None where ONNX Runtime's CPU has none that it can run.

    Raises:
        BackendError: there is no ONNX Runtime.
        BundleError: no bundle at `reference`.
        InvalidInput: it is of another checkpoint, or not float32.
    """
    if reference is None:
        if bundle.manifest.dtype == "bfloat16":
            return None
        reference = bundle.folder
    if find_spec("onnxruntime") is None:
        raise BackendError(
            "onnxruntime: not installed, and the check after the build compares with it. pip install onnxruntime, "
            "or leave the check out with --no-verify"
        )
    if reference == bundle.folder:
        return reference
    other = Bundle.load(reference).manifest
    if other.dtype != "float32" or (other.family, other.language, other.normalization) != (
        bundle.manifest.family,
        bundle.manifest.language,
        bundle.manifest.normalization,
    ):
        raise InvalidInput(
            f"--reference: {reference} is {other.dtype} {other.family} with {other.normalization} scores, expected a "
            f"float32 export of the same checkpoint as {bundle.folder}"
        )
    return reference


def _fits(plans: Pipeline, case: ParityCase, limits: Limits) -> bool:
    layout = plans.layout(case.inputs)
    kept = kept_count(layout, PruningConfig(keep_ratio=plans.bundle.manifest.keep_ratio))
    return (
        layout.num_visual <= limits.visual_tokens
        and layout.num_tokens <= limits.prompt_tokens
        and layout.num_tokens - layout.num_visual + kept + STEPS <= limits.context
    )
