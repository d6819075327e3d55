"""`hawk-trt parity`: a bundle against its checkpoint in PyTorch, stage by stage; exit 1 out of tolerance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
from cyclopts import Group, Parameter
from rich.console import Console

from hawk_trt.apps.cli.models import expect_checkpoint, manifest_of, ready
from hawk_trt.apps.cli.options import OUTPUT, PRUNING, Dtype, Json, Model, Numbers, Scoring, Where
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.apps.parity.report import CaseReport, ParityCase, ParityReport, compare_case, told
from hawk_trt.bundle import REFERENCE
from hawk_trt.errors import BundleError, InvalidInput, ParityError
from hawk_trt.runtime import reference as stage_reference
from hawk_trt.runtime.comparison import tolerance_of

if TYPE_CHECKING:
    from hawk_trt import Pipeline
    from hawk_trt.request import ImageInput, VideoInput

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

    def cases(self, pipe: "Pipeline", query: str | None) -> list[ParityCase]:
        """The prompts by name, as the tensors that both sides get."""
        bundle, prompts = pipe.bundle, self.prompt or ("Describe what is shown.",)
        tensors = stage_reference.tensor_prompts(bundle.manifest, self.seed)
        if "tokenizer.json" not in bundle.manifest.files:
            if self.prompt or self.images or self.videos:
                raise BundleError(
                    f"{bundle.folder}: it has no tokenizer, so it takes no --prompt, --images or --videos. Leave them "
                    "out: parity then compares tensors of its own"
                )
            if query == "turn":
                raise ParityError("--query turn: it needs a tokenizer, and this bundle has none. Use --query paper")
            return list(tensors.items())
        shown = self._shown()
        cases = [
            (f"{name}, prompt {number}" if len(prompts) > 1 else name, pipe.prepare(prompt, images, videos))
            for number, prompt in enumerate(prompts, start=1)
            for name, images, videos in shown
        ]
        if query != "turn" and not (self.images or self.videos):  # a video of tensors has no user's turn
            cases += [(name, inputs) for name, inputs in tensors.items() if name.startswith("video")]
        return cases

    def _shown(self) -> "list[tuple[str, Sequence[ImageInput], Sequence[VideoInput]]]":
        """What each question is asked about: a name, images and videos."""
        if self.images or self.videos:
            if self.together:
                return [(", ".join(path.name for path in (*self.images, *self.videos)), self.images, self.videos)]
            return [
                *((path.name, [path], ()) for path in self.images),
                *((path.name, (), [path]) for path in self.videos),
            ]
        rng = np.random.default_rng(self.seed)
        return [
            ("noise 224x224", [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)], []),
            ("gradient 336x196", [_gradient(336, 196)], []),
            ("two images", [_gradient(168, 112), rng.integers(0, 256, (224, 112, 3), dtype=np.uint8)], []),
            ("text only", [], []),
        ]


def _gradient(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Red from left to right, green from top to bottom, blue in rings."""
    y, x = np.mgrid[0:height, 0:width]
    rings = np.hypot(x - width / 2, y - height / 2) * 8 % 256
    return np.stack([x * 255 / width, y * 255 / height, rings], axis=-1).astype(np.uint8)


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
    manifest = manifest_of(ready(model))
    if save and manifest.dtype != "float32":
        raise InvalidInput(f"--save: got a {manifest.dtype} bundle, a reference is made in float32")
    # Missing torch is said before anything is loaded; the import is here since only this command needs it.
    from hawk_trt.apps.cli.torch_model import load_reference

    ratios = keep_ratios or sorted({manifest.keep_ratio, 1.0})
    prunings = [scoring.config(ratio) for ratio in ratios]
    pipe = where.open(model)
    cases = compared.cases(pipe, scoring.query)
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
        name, inputs = case
        note(f"case {number} of {len(cases)}: {name}")
        embedded = reference.embed(inputs, prompt_tokens(pipe.bundle))
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
        Console().print(*told(report), sep="\n", soft_wrap=True)
    if save and report.passed:
        made = stage_reference.Reference.make(pipe)
        for folder in save:
            made.put_into(folder)
            note(f"{folder / REFERENCE}: written")
    return 0 if report.passed else 1
