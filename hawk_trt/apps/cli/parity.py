"""`hawk-trt parity`: a bundle against its checkpoint in PyTorch, stage by stage; exit 1 out of tolerance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from rich.console import Console

from hawk_trt.apps.cli.models import expect_checkpoint, load_bundle
from hawk_trt.apps.cli.options import OUTPUT, PRUNING, Dtype, Json, Model, Numbers, Scoring, Where
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.parity.cases import DEFAULT_PROMPT, ParityCase, generated_cases, given_cases, tensor_cases
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.apps.parity.report import CaseReport, ParityReport, compare_case, tell
from hawk_trt.bundle import REFERENCE, Bundle
from hawk_trt.errors import BundleError, InvalidInput, ParityError
from hawk_trt.runtime import reference as stage_reference
from hawk_trt.runtime.comparison import tolerance_of

if TYPE_CHECKING:
    from hawk_trt import Pipeline

_REFERENCE = Group("Reference", sort_key=3)


@Parameter(name="*", group=Group("What is compared", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class Compared:
    """The prompts of both sides: what the options say, else generated images, or tensors without a tokenizer.

    Attributes:
        images: images, each a case of its own
        videos: videos, each a case of its own
        together: all images and videos in one prompt
        prompt: a question; repeatable
        steps: tokens generated and compared
        seed: of what is generated
    """

    images: Annotated[tuple[Path, ...], Parameter(name=("--images", "--image"), consume_multiple=True)] = ()
    videos: Annotated[tuple[Path, ...], Parameter(name=("--videos", "--video"), consume_multiple=True)] = ()
    together: bool = False
    prompt: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = ()
    steps: int = 8
    seed: int = 0

    def cases(self, pipe: "Pipeline", bundle: Bundle, query: str | None) -> list[ParityCase]:
        """The prompts as tensors."""
        prompts: Sequence[str] = self.prompt or [DEFAULT_PROMPT]
        has_tokenizer = "tokenizer.json" in bundle.manifest.files
        if not has_tokenizer and (self.prompt or self.images or self.videos):
            raise BundleError(
                f"{bundle.folder}: it has no tokenizer, so it takes no --prompt, --images or --videos. Leave them out: "
                "parity then compares tensors of its own"
            )
        if self.images or self.videos:
            return given_cases(pipe, prompts, self.images, self.videos, together=self.together)
        if query == "turn" and not has_tokenizer:
            raise ParityError("--query turn: it needs a tokenizer, and this bundle has none. Use --query paper")
        if not has_tokenizer:
            return tensor_cases(bundle.manifest, self.seed)
        cases = generated_cases(pipe, prompts, self.seed)
        if query != "turn":  # a video of tensors has no user's turn
            cases += tensor_cases(bundle.manifest, self.seed, only_video=True)
        return cases


def parity(
    model: Model,
    where: Where = Where(),
    scoring: Scoring = Scoring(),
    compared: Compared = Compared(),
    *,
    checkpoint: Annotated[str, Parameter(group=_REFERENCE)],
    keep_ratios: Annotated[
        Numbers, Parameter(name=("--keep-ratio", "--keep-ratios"), consume_multiple=True, group=PRUNING)
    ] = (),
    reference_device: Annotated[str, Parameter(group=_REFERENCE)] = "cpu",
    reference_dtype: Annotated[Dtype, Parameter(group=_REFERENCE)] = "float32",
    save: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, group=OUTPUT)] = (),
    json: Json = False,
) -> int:
    """Compare a bundle with its checkpoint in PyTorch, stage by stage; exits with 1 where it is out of tolerance.

    Example: hawk-trt parity artifacts/3b --checkpoint Qwen/Qwen2.5-VL-3B-Instruct

    Args:
        checkpoint: the checkpoint folder that the bundle was exported from, or its hub id
        keep_ratios: shares of visual tokens kept (default: the bundle's, and 1)
        reference_device: of torch
        reference_dtype: of the model in PyTorch
        save: bundles of the same checkpoint, whose reference.npz this float32 bundle makes, if it is in tolerance
        json: print the report as JSON
    """
    if compared.steps < 1:
        raise InvalidInput(f"--steps: got {compared.steps}, expected at least 1")
    expect_checkpoint(checkpoint, compared=True)
    bundle = load_bundle(model)
    manifest = bundle.manifest
    if save and manifest.dtype != "float32":
        raise InvalidInput(f"--save: got a {manifest.dtype} bundle, a reference is made in float32")
    # Missing torch is said before anything is loaded; the import is here since only this command needs it.
    from hawk_trt.apps.cli.torch_model import load_reference

    ratios = keep_ratios or sorted({manifest.keep_ratio, 1.0})
    prunings = [scoring.config(ratio) for ratio in ratios]
    pipe = where.open(model)
    cases = compared.cases(pipe, bundle, scoring.query)
    note(f"loading {checkpoint} in PyTorch ({reference_dtype}, {reference_device})")
    reference = load_reference(
        checkpoint,
        head_weights=manifest.head_weights.values,
        normalization=manifest.normalization,
        device=reference_device,
        dtype=reference_dtype,
    )
    tolerance = tolerance_of(manifest)
    reports: list[CaseReport] = []
    for number, case in enumerate(cases, start=1):
        note(f"case {number} of {len(cases)}: {case.name}")
        embedded = reference.embed(case.inputs, prompt_tokens(bundle))
        reports += [
            compare_case(pipe, reference, case, embedded, pruning, compared.steps, tolerance)
            for pruning in (prunings if embedded.visual else prunings[:1])  # without visual tokens all are one
        ]
    failures = tuple(failure for case in reports for failure in case.failures)
    report = ParityReport(
        bundle=str(model),
        checkpoint=str(checkpoint),
        backend=f"{pipe.backend.name} on {pipe.backend.device}",
        dtype=manifest.precision,
        reference_dtype=reference_dtype,
        tolerance=tolerance,
        cases=tuple(reports),
        failures=failures,
        passed=not failures,
    )
    if json:
        print_json(report)
    else:
        Console().print(tell(report), soft_wrap=True)
    if save and report.passed:
        made = stage_reference.Reference.make(pipe)
        for folder in save:
            made.put_into(folder)
            note(f"{folder / REFERENCE}: written")
    return 0 if report.passed else 1
