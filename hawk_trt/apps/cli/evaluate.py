"""`hawk-trt eval`: a data set answered with every selector at every keep ratio; accuracy, tokens, time, cache."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console, RenderableType

from hawk_trt.apps.cli.options import OUTPUT, PRUNING, QUESTIONS, Asked, Choosing, Json, KeepRatios, Model, Where, names
from hawk_trt.apps.cli.output import counted, note, print_json, table
from hawk_trt.apps.evaluate import trials
from hawk_trt.apps.evaluate.datasets import TINY, Dataset, load_dataset
from hawk_trt.apps.evaluate.metrics import METRICS, Metric, metric_for
from hawk_trt.apps.evaluate.report import write_report
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.evaluate.summary import STAGES, Row, summarise, unsteady
from hawk_trt.bundle import manifest_digest
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.request import EQUAL_HEADS, SCORED, SELECTORS, PruningConfig

if TYPE_CHECKING:
    from hawk_trt import Pipeline

FASTV = "fastv"
RESULTS = "results.jsonl"


def evaluate(
    model: Model,
    where: Where = Where(),
    choosing: Choosing = Choosing(),
    *,
    dataset: Annotated[str, Parameter(group=QUESTIONS)] = TINY,
    metric: Annotated[str | None, Parameter(choices=tuple(METRICS), group=QUESTIONS)] = None,
    asked: Asked = Asked(),
    keep_ratios: KeepRatios = (1.0, 0.4, 0.2, 0.1),
    selectors: Annotated[
        tuple[str, ...],
        Parameter(group=PRUNING),
        names((*SELECTORS, FASTV), name=("--selectors", "--selector")),
    ] = ("hawk", "random"),
    checkpoint: Annotated[str | None, Parameter(group=PRUNING)] = None,
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("eval"),
    json: Json = False,
) -> int:
    """Answer a data set with every selector and keep ratio: accuracy, tokens, time, cache.

    Example: hawk-trt eval artifacts/3b --dataset questions.jsonl --selectors hawk,random --keep-ratio 1,0.2

    Args:
        dataset: tiny (the task of the shipped model), easy-vqa (of that package), a JSONL file, or a folder with
            samples.jsonl; a line is {"image": "a.png", "question": "...", "answer": "..."}
        metric: how an answer is judged (default: multiple-choice of samples with choices, exact-match of others)
        keep_ratios: shares of visual tokens kept, with commas between them; 1 is answered once for all selectors
        selectors: hawk, random and others (docs/selectors.md), with commas between them; fastv answers in PyTorch
        checkpoint: of fastv: the folder that the bundle was exported from, or its hub id
        out: folder of results.jsonl, which the next run goes on with; of summary.json, summary.csv and plots
        json: print the summary as JSON
    """
    if FASTV in selectors and checkpoint is None:
        raise InvalidInput(f"--selectors {FASTV}: it answers in PyTorch, so it needs --checkpoint")
    cells = _cells(selectors, keep_ratios, choosing)
    samples = load_dataset(dataset, asked.count, asked.seed)
    metric = metric_for(metric, samples)
    if samples.unknown_keys:
        note(f"{dataset}: nothing reads these keys of its samples: {', '.join(samples.unknown_keys)[:200]}")
    pipe = where.open(model)
    if pipe.processor.chat is None:
        raise BundleError(f"{model}: it has no tokenizer, so it cannot answer questions")
    subject = _subject(asked, metric, choosing, pipe, samples)
    with closing(ResultLog(out / RESULTS, subject, trials.Trial)) as log:
        left = trials.missing(samples, cells, log)
        if left < samples.count * len(cells):
            note(f"{out / RESULTS}: {samples.count * len(cells) - left} answers known, {left} to go")
        answer = _answerer(pipe, METRICS[metric], asked.max_new_tokens, checkpoint)
        made = trials.run_trials(samples, cells, log, pipe, answer, asked.seed, asked.max_pixels)
        for _ in counted(made, left, "answers"):
            pass
    rows = summarise(log.records, cells, [sample.id for sample in samples])
    manifest = pipe.bundle.manifest
    runs = f"{Path(manifest.source.name).name}, {manifest.precision}, {pipe.backend.name} on {pipe.backend.device}"
    title = f"{Path(samples.name).name}, {samples.count} samples: {runs}"
    no_plots = write_report(out, rows, subject, title)
    if json:
        told = {"dataset": dataset, "samples": samples.count, "metric": metric, "out": str(out)}
        print_json(told, {"rows": rows})
    else:
        Console().print(*_told(rows), sep="\n")
    for warning in unsteady(rows):
        note(f"warning: {warning}")
    note(f"results and summary{'' if no_plots else ' and plots'}: {out}")
    if no_plots:
        note(no_plots)
    return 0


def _cells(selectors: Sequence[str], keep_ratios: Sequence[float], choosing: Choosing) -> list[trials.Cell]:
    """Every selector at every keep ratio, and all of keep ratio 1 as one."""
    cells: dict[tuple[str, float], trials.Cell] = {}
    for keep_ratio, selector in product(keep_ratios, selectors):
        name, own = selector, choosing
        if selector in SCORED:
            name += "" if choosing.keep_mass is None else f", mass {choosing.keep_mass:g}"
            name += "" if not choosing.diversity else f", diversity {choosing.diversity:g}"
        else:
            own = replace(choosing, keep_mass=None, diversity=0.0)
        pruning = own.config(keep_ratio)
        pruning = replace(
            pruning,
            selector=pruning.selector if selector == FASTV else selector,
            head_weights=None if selector in (*EQUAL_HEADS, FASTV) else pruning.head_weights,
        )
        if pruning.keep_ratio == 1.0 and pruning.keep_mass is None:
            name, pruning = trials.UNPRUNED, PruningConfig(keep_ratio=1.0)
        cell = trials.Cell(name, pruning)
        cells.setdefault(cell.key, cell)
    return list(cells.values())


def _answerer(pipe: "Pipeline", metric: Metric, max_new_tokens: int, checkpoint: str | None) -> trials.Answerer:
    """Answers with the pipeline, and where FastV is asked for with the checkpoint in PyTorch."""
    own = trials.pipeline_answerer(pipe, metric, max_new_tokens)

    @cache
    def fastv() -> trials.Answerer:
        from hawk_trt.apps.cli.torch_model import load_reference  # torch, only if asked for
        from hawk_trt.apps.evaluate.fastv import FastV, check_layers, fastv_answerer

        assert checkpoint is not None  # evaluate has asked for it
        check_layers(pipe.bundle.manifest)
        note(f"loading {checkpoint} in PyTorch (float32, cpu)")
        model = load_reference(checkpoint, head_weights=(), normalization="l2", device="cpu", dtype="float32").model
        return fastv_answerer(FastV(model), pipe, metric, max_new_tokens)

    return lambda prepared, cell: (fastv() if cell.selector == FASTV else own)(prepared, cell)


def _subject(asked: Asked, metric: str, choosing: Choosing, pipe: "Pipeline", samples: Dataset) -> dict[str, str]:
    """What the results are of: another run goes on with them where all of it is the same."""
    weights = choosing.config(1.0).head_weights
    return {
        "bundle": manifest_digest(pipe.bundle.manifest),
        "runtime": f"{pipe.backend.name}, {pipe.backend.device}, {pipe.backend.target}",
        "dataset": samples.fingerprint,
        "metric": metric,
        "max_new_tokens": str(asked.max_new_tokens),
        "max_pixels": str(asked.max_pixels),
        "query": choosing.query or "paper, else turn",
        "quota": choosing.quota,
        "min_visual_tokens": str(choosing.min_visual_tokens),
        "head_weights": "the bundle's" if weights is None else ", ".join(f"{weight:g}" for weight in weights),
    }


def _told(rows: Sequence[Row]) -> tuple[RenderableType, ...]:
    """The rows as two tables, each of which fits a terminal of 80 columns."""
    answers = table("selector", "keep", "kept", "accuracy [95 %]", "total, ms", "KV, kB", left=1, gap=1)
    times = table("median ms", "keep", *STAGES[:-1], left=1, gap=1)
    for row in rows:
        accuracy = row.accuracy
        latencies = ["-" if row.latency_ms is None else f"{row.latency_ms[stage]:.2f}" for stage in STAGES]
        answers.add_row(
            f"{row.selector}{' *' if row.on_front else ''}",
            f"{row.keep_ratio:g}",
            f"{row.num_kept:.1f} of {row.num_visual:.1f}",
            f"{100 * accuracy.mean:.1f} % [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
            latencies[-1],
            f"{row.kv_bytes / 1000:.1f}",
        )
        times.add_row(row.selector, f"{row.keep_ratio:g}", *latencies[:-1])
    count = max(row.samples for row in rows)
    return answers, times, f"{count} samples. * is on the Pareto front: nothing is as accurate in less time."
