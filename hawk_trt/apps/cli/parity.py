"""`hawk-trt parity`: a bundle against its checkpoint in PyTorch, stage by stage; exit 1 out of tolerance."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.parity.cases import DEFAULT_PROMPT, ParityCase, generated_cases, given_cases, tensor_cases
from hawk_trt.apps.parity.check import compare_case
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.apps.parity.report import ParityReport, print_report
from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, InvalidInput, ParityError
from hawk_trt.runtime import reference as stage_reference
from hawk_trt.runtime.comparison import tolerance_of
from hawk_trt.stages import DTYPES

if TYPE_CHECKING:
    from hawk_trt import Pipeline

SUMMARY = "compare a bundle with its checkpoint in PyTorch, stage by stage"


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "parity", SUMMARY)
    options.add_pipeline_options(parser)
    group = parser.add_argument_group("pruning")
    options.add_pruning_options(group)
    group.add_argument(
        "--keep-ratio", type=float, nargs="+", help="shares of visual tokens kept (default: the bundle's, and 1)"
    )
    group = parser.add_argument_group("what is compared (default: generated images, or tensors without a tokenizer)")
    group.add_argument("--images", type=Path, nargs="+", default=[], help="images, each a case of its own")
    group.add_argument("--videos", type=Path, nargs="+", default=[], help="videos, each a case of its own")
    group.add_argument("--together", action="store_true", help="all images and videos in one prompt")
    group.add_argument("--prompt", action="append", help=f"a question; repeatable (default: {DEFAULT_PROMPT!r})")
    group.add_argument("--steps", type=int, default=8, help="tokens generated and compared (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of what is generated (default: %(default)s)")
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--checkpoint", required=True, help="the checkpoint folder that the bundle was exported from, or its hub id"
    )
    group.add_argument("--reference-device", default="cpu", help="of torch (default: %(default)s)")
    group.add_argument(
        "--reference-dtype", choices=DTYPES, default="float32", help="of the model in PyTorch (default: %(default)s)"
    )
    parser.add_argument(
        "--save",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help=f"bundles of the same checkpoint, in any dtype: their {stage_reference.REFERENCE}, which builds "
        "are compared with, becomes what this one's stages make of a few prompts, if it is float32 and in tolerance",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, print the report; 0 in tolerance, 1 not.

    Raises:
        HawkError: the bundle, the checkpoint or an input cannot be used.
    """
    if args.steps < 1:
        raise InvalidInput(f"--steps: got {args.steps}, expected at least 1")
    bundle = options.load_bundle(args.bundle)
    manifest = bundle.manifest
    if args.save and manifest.dtype != "float32":
        raise InvalidInput(f"--save: got a {manifest.dtype} bundle, a reference is made in float32")
    # Missing torch is said before anything is loaded; the import is here since only this command needs it.
    from hawk_trt.apps.parity.reference import Reference

    ratios = args.keep_ratio or sorted({manifest.keep_ratio, 1.0})
    prunings = [options.pruning(args, ratio) for ratio in ratios]
    pipe = options.open_pipeline(args)
    cases = _cases(args, pipe, bundle)
    note(f"loading {args.checkpoint} in PyTorch ({args.reference_dtype}, {args.reference_device})")
    reference = Reference.load(
        args.checkpoint,
        head_weights=manifest.head_weights.values,
        normalization=manifest.normalization,
        device=args.reference_device,
        dtype=args.reference_dtype,
    )
    tolerance = tolerance_of(manifest)
    reports = tuple(
        compare_case(pipe, reference, case, embedded, pruning, args.steps, tolerance)
        for case in _told(cases)
        for embedded in [reference.embed(case.inputs, prompt_tokens(bundle))]
        for pruning in (prunings if embedded.visual else prunings[:1])  # without visual tokens all are one
    )
    failures = tuple(failure for case in reports for failure in case.failures)
    report = ParityReport(
        bundle=str(args.bundle),
        checkpoint=str(args.checkpoint),
        backend=f"{pipe.backend.name} on {pipe.backend.device}",
        dtype=manifest.precision,
        reference_dtype=args.reference_dtype,
        tolerance=tolerance,
        cases=reports,
        failures=failures,
        passed=not failures,
    )
    if args.json:
        print_json(report)
    else:
        print_report(report, Console())
    if args.save and report.passed:
        made = stage_reference.Reference.make(pipe)
        for folder in args.save:
            made.put_into(folder)
            note(f"{folder / stage_reference.REFERENCE}: written")
    return 0 if report.passed else 1


def _cases(args: argparse.Namespace, pipe: "Pipeline", bundle: Bundle) -> list[ParityCase]:
    prompts: Sequence[str] = args.prompt or [DEFAULT_PROMPT]
    has_tokenizer = "tokenizer.json" in bundle.manifest.files
    if not has_tokenizer and (args.prompt or args.images or args.videos):
        raise BundleError(
            f"{bundle.folder}: it has no tokenizer, so it takes no --prompt, --images or --videos. Leave them out: "
            "parity then compares tensors of its own"
        )
    if args.images or args.videos:
        return given_cases(pipe, prompts, args.images, args.videos, together=args.together)
    if args.query == "turn" and not has_tokenizer:
        raise ParityError("--query turn: it needs a tokenizer, and this bundle has none. Use --query paper")
    if not has_tokenizer:
        return tensor_cases(bundle.manifest, args.seed)
    cases = generated_cases(pipe, prompts, args.seed)
    if args.query != "turn":  # a video of tensors has no user's turn
        cases += tensor_cases(bundle.manifest, args.seed, only_video=True)
    return cases


def _told(cases: Sequence[ParityCase]) -> Iterator[ParityCase]:
    for number, case in enumerate(cases, start=1):
        note(f"case {number} of {len(cases)}: {case.name}")
        yield case
