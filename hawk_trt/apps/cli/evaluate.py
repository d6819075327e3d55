"""`hawk-trt eval`: a data set answered with every selector at every keep ratio; accuracy, tokens, time, cache."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.cli.progress import progress
from hawk_trt.apps.evaluate.datasets import TINY, Dataset, Sample, load_dataset
from hawk_trt.apps.evaluate.metrics import METRICS
from hawk_trt.apps.evaluate.report import write_report
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.evaluate.summary import print_rows, summarise
from hawk_trt.apps.evaluate.trials import (
    UNPRUNED,
    Answerer,
    Cell,
    PipelineAnswerer,
    PreparedSample,
    Trial,
    missing,
    prepare,
    run_trials,
)
from hawk_trt.bundle import manifest_digest
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.request import EQUAL_HEADS, SCORED, SELECTORS, PruningConfig

if TYPE_CHECKING:
    from hawk_trt import Pipeline

SUMMARY = "answer a data set with every selector and keep ratio: accuracy, tokens, time, cache"
FASTV = "fastv"
RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True)
class _Report:
    dataset: str
    samples: int
    metric: str
    out: str


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "eval", SUMMARY)
    options.add_pipeline_options(parser)
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--dataset",
        default=TINY,
        help=f"{TINY} (the task of the shipped model), a JSONL file, or a folder with samples.jsonl; a line is "
        '{"image": "a.png", "question": "...", "answer": "..."} (default: %(default)s)',
    )
    group.add_argument("--count", type=int, help=f"samples taken (default: all of a file, 100 of {TINY})")
    group.add_argument("--seed", type=int, default=0, help="of samples and random choices (default: %(default)s)")
    group.add_argument("--metric", choices=METRICS, default="exact-match", help="(default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    group.add_argument("--max-pixels", type=int, help="shrink larger images to this area (default: the checkpoint's)")
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--selectors",
        type=_selectors,
        default="hawk,random",
        metavar="S,S,...",
        help=f"some of {', '.join(SELECTORS)}; {FASTV} answers in PyTorch (default: %(default)s)",
    )
    group.add_argument(
        "--keep-ratios",
        type=_numbers,
        default="1,0.4,0.2,0.1",
        metavar="R,R,...",
        help="shares of visual tokens kept, each in (0, 1]; 1 is answered once for all (default: %(default)s)",
    )
    options.add_pruning_options(group)
    options.add_score_options(group)
    group.add_argument("--checkpoint", help=f"of {FASTV}: the folder that the bundle was exported from, or its hub id")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("eval"),
        metavar="DIR",
        help=f"{RESULTS}, which the next run goes on with; summary.json, summary.csv and plots (default: %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet, and sum up.

    Raises:
        HawkError: the bundle, the data set or an option cannot be used, or the results there are of something else.
    """
    if args.max_new_tokens < 1:
        raise InvalidInput(f"--max-new-tokens: got {args.max_new_tokens}, expected at least 1")
    if FASTV in args.selectors and args.checkpoint is None:
        raise InvalidInput(f"--selectors {FASTV}: it answers in PyTorch, so it needs --checkpoint")
    cells = make_cells(args)
    dataset = load_dataset(args.dataset, args.count, args.seed)
    pipe = options.open_pipeline(args)
    if pipe.chat_tokenizer() is None:
        raise BundleError(f"{args.bundle}: it has no tokenizer, so it cannot answer questions")
    subject = _subject(args, pipe, dataset)
    log = ResultLog(args.out / RESULTS, subject, Trial)
    try:
        left = missing(dataset, cells, log)
        if left < dataset.count * len(cells):
            note(f"{args.out / RESULTS}: {dataset.count * len(cells) - left} answers known, {left} to go")
        for _ in progress(_trials(args, pipe, dataset, cells, log), left, "answers"):
            pass
    finally:
        log.close()
    rows = summarise(log.records, cells, [sample.id for sample in dataset])
    no_plots = write_report(args.out, rows, subject, _title(pipe, dataset))
    if args.json:
        print_json(_Report(args.dataset, dataset.count, args.metric, str(args.out)), {"rows": rows})
    else:
        print_rows(rows, Console())
    note(f"results and summary{'' if no_plots else ' and plots'}: {args.out}")
    if no_plots:
        note(no_plots)
    return 0


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """Every selector at every keep ratio, and all of keep ratio 1 as one.

    Raises:
        InvalidInput: a value out of its range.
    """
    cells: dict[tuple[str, float], Cell] = {}
    for keep_ratio in args.keep_ratios:
        for selector in args.selectors:
            cell = _cell(args, selector, options.pruning(args, keep_ratio))
            cells.setdefault(cell.key, cell)
    return list(cells.values())


def _cell(args: argparse.Namespace, selector: str, pruning: PruningConfig) -> Cell:
    if selector in EQUAL_HEADS or selector == FASTV:
        pruning = replace(pruning, head_weights=None)
    name = selector
    if selector in SCORED:
        pruning = replace(pruning, selector=selector, keep_mass=args.keep_mass, diversity=args.diversity)
        name += "" if args.keep_mass is None else f", mass {args.keep_mass:g}"
        name += "" if not args.diversity else f", diversity {args.diversity:g}"
    elif selector != FASTV:
        pruning = replace(pruning, selector=selector)
    if pruning.keep_ratio == 1.0 and pruning.keep_mass is None:
        return Cell(UNPRUNED, PruningConfig(keep_ratio=1.0))
    return Cell(name, pruning)


def _trials(
    args: argparse.Namespace, pipe: "Pipeline", dataset: Dataset, cells: Sequence[Cell], log: ResultLog[Trial]
) -> Iterator[Trial]:
    metric = METRICS[args.metric]
    own = PipelineAnswerer(pipe, metric, args.max_new_tokens)

    @cache
    def fastv() -> Answerer:
        from hawk_trt.apps.evaluate.fastv import FastV, FastVAnswerer  # torch, only for those who ask for it

        note(f"loading {args.checkpoint} in PyTorch (float32, cpu)")
        return FastVAnswerer(FastV.load(args.checkpoint), pipe, metric, args.max_new_tokens)

    def answerer(cell: Cell) -> Answerer:
        return fastv() if cell.selector == FASTV else own

    def prepared(sample: Sample) -> PreparedSample:
        try:
            return prepare(pipe, sample, max_pixels=args.max_pixels)
        except InvalidInput as error:
            raise InvalidInput(f"sample {sample.id}: {error}") from error

    return run_trials(dataset, cells, log, prepared, answerer, args.seed)


def _subject(args: argparse.Namespace, pipe: "Pipeline", dataset: Dataset) -> dict[str, str]:
    """What the results are of: another run goes on with them where all of it is the same."""
    weights = options.pruning(args, 1.0).head_weights
    return {
        "bundle": manifest_digest(pipe.bundle.manifest),
        "runtime": f"{pipe.backend.name}, {pipe.backend.device}, {pipe.backend.target}",
        "dataset": dataset.fingerprint,
        "metric": args.metric,
        "max_new_tokens": str(args.max_new_tokens),
        "max_pixels": str(args.max_pixels),
        "query": args.query or "paper, else turn",
        "quota": args.quota,
        "min_visual_tokens": str(args.min_visual_tokens),
        "head_weights": "the bundle's" if weights is None else ", ".join(f"{weight:g}" for weight in weights),
    }


def _title(pipe: "Pipeline", dataset: Dataset) -> str:
    manifest = pipe.bundle.manifest
    model = f"{Path(manifest.source.name).name}, {manifest.precision}"
    return f"{model}, on {Path(dataset.name).name}: {dataset.count} samples"


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers with commas between them") from None


def _selectors(text: str) -> list[str]:
    names = text.split(",")
    known = (*SELECTORS, FASTV)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {', '.join(known)}")
    return names
