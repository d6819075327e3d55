"""`hawk-trt calibrate`: how much each query head matters, measured by leaving it out; a weights file at the end."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.console import Console, RenderableType

from hawk_trt.apps.cli.main import where_it_lies
from hawk_trt.apps.cli.models import download, expect_checkpoint, is_hub_id
from hawk_trt.apps.cli.options import OUTPUT, QUESTIONS, WHERE, Asked, Dtype, Json
from hawk_trt.apps.cli.output import counted, note, print_json, table
from hawk_trt.apps.evaluate import calibration
from hawk_trt.apps.evaluate.datasets import TINY, load_dataset
from hawk_trt.apps.evaluate.importance import importance
from hawk_trt.apps.evaluate.metrics import METRICS, metric_for
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.errors import InvalidInput

_LEFT_OUT = Group("What is left out", sort_key=2)


def calibrate(
    checkpoint: str,
    *,
    dataset: Annotated[tuple[str, ...], Parameter(group=QUESTIONS)] = (TINY,),
    metric: Annotated[tuple[str, ...], Parameter(choices=tuple(METRICS), group=QUESTIONS)] = (),
    asked: Asked = Asked(),
    revision: str | None = None,
    scope: Annotated[str, Parameter(choices=calibration.SCOPES, group=_LEFT_OUT)] = calibration.FIRST_LAYER,
    device: Annotated[str, Parameter(group=WHERE)] = "cpu",
    dtype: Annotated[Dtype, Parameter(group=WHERE)] = "float32",
    heads_at_once: Annotated[int, Parameter(group=WHERE)] = 8,
    shards: Annotated[int | None, Parameter(group=WHERE)] = None,
    ray_address: Annotated[str | None, Parameter(group=WHERE)] = None,
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("head-weights.json"),
    work: Annotated[Path, Parameter(group=OUTPUT)] = Path("calibration"),
    json: Json = False,
) -> int:
    """Measure how much each query head matters, by leaving it out (needs PyTorch).

    Example: hawk-trt calibrate Qwen/Qwen2.5-VL-3B-Instruct --dataset questions.jsonl --out weights.json

    Args:
        checkpoint: a checkpoint folder, or a hub id such as owner/name
        dataset: tiny (the task of the shipped model), a JSONL file, or a folder with samples.jsonl, a line being
            {"image": "a.png", "question": "...", "answer": "..."}; repeatable, each has the same say
        metric: of all data sets; repeat it for one of each (default: multiple-choice of samples with
            choices, exact-match of others)
        revision: branch, tag or commit of a hub id
        scope: leave the head out of layer 0, or the head of that number out of every layer
        device: of torch
        dtype: of the model
        heads_at_once: answers side by side; fewer need less memory
        shards: workers on a Ray cluster, each on a GPU of its own with --device cuda
        ray_address: of the cluster (default: RAY_ADDRESS, else one on this machine, started if need be)
        out: JSON file, the weights
        work: folder of every answer, which the next run goes on with
        json: print the weights file
    """
    # torch, when missing, is said before anything is read
    from hawk_trt.apps.cli.torch_model import load_reference  # isort: skip
    from hawk_trt.apps.evaluate.calibration_worker import Worker, do_on_ray

    for name, value in (("--heads-at-once", heads_at_once), ("--shards", shards)):
        if value is not None and value < 1:
            raise InvalidInput(f"{name}: got {value}, expected at least 1")
    expect_checkpoint(checkpoint, compared=True)
    hub_id = checkpoint if is_hub_id(checkpoint) else None
    if revision is not None and hub_id is None:
        raise InvalidInput(f"--revision: only for a hub id (owner/name), got {checkpoint}")
    plan = calibration.Plan(
        checkpoint=Path(checkpoint).resolve(),
        sources=_sources(dataset, metric, asked),
        scope=scope,
        open=import_module(where_it_lies("export.bare_bundle")).open_checkpoint,
        load=load_reference,
        special_tokens=prompt_tokens,
        max_new_tokens=asked.max_new_tokens,
        max_pixels=asked.max_pixels,
        dtype=dtype,
        device=device,
    )
    if hub_id:  # after all that could be wrong without it
        plan = replace(plan, checkpoint=download(hub_id, revision))
    bundle = plan.open(plan.checkpoint, hub_id)
    num_heads = bundle.manifest.language.num_attention_heads
    with ExitStack() as stack:
        logs = [
            stack.enter_context(
                closing(
                    ResultLog(
                        work / f"{source.name}.jsonl",
                        _subject(plan, bundle.manifest.source.fingerprint, source),
                        calibration.Scores,
                        option="--work",
                        sync=True,
                    )
                )
            )
            for source in plan.sources
        ]
        left = list(calibration.units_left(plan, [log.records for log in logs], num_heads, heads_at_once))
        questions = sum(len(source.questions) for source in plan.sources)
        total, to_go = questions * (1 + num_heads), sum(len(unit.heads) for unit in left)
        note(f"{total} answers: {num_heads} heads and the whole model; {total - to_go} known in {work}")
        if left:
            done = do_on_ray(plan, left, shards, ray_address) if shards else map(Worker(plan).do, left)
            for unit, scores in counted(done, len(left), f"units of up to {heads_at_once} answers"):
                logs[unit.source].append(scores)
        tables = [
            calibration.score_table(source, log.records, num_heads)
            for source, log in zip(plan.sources, logs, strict=True)
        ]
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    report = calibration.make_report(plan, bundle.manifest.source, tables, importance(tables), versions)
    calibration.write_report(report, out)
    if json:
        print_json(report)
    else:
        Console().print(*_told(report), sep="\n", highlight=False)
    note(f"weights: {out}. Use them: --head-weights {out}, here or in python -m export")
    if not report.differs_from_uniform and json:
        note(_verdict(report))
    return 0


def _sources(datasets: Sequence[str], metrics: tuple[str, ...], asked: Asked) -> tuple[calibration.Source, ...]:
    names = [name if name == TINY else str(Path(name).resolve()) for name in datasets]
    wanted: tuple[str | None, ...] = metrics or (None,)
    if len(wanted) not in (1, len(names)):
        raise InvalidInput(f"--metric: got {len(wanted)} for {len(names)} data sets, expected one, or one of each")
    sources = []
    for name, metric in zip(names, wanted * (len(names) // len(wanted)), strict=True):
        samples = load_dataset(name, asked.count, asked.seed)
        if samples.unknown_keys:
            note(f"{name}: nothing reads these keys of its samples: {', '.join(samples.unknown_keys)[:200]}")
        short, judged = Path(name).stem or name, metric_for(metric, samples)
        sources.append(calibration.Source(short, tuple(samples), samples.fingerprint, asked.seed, judged))
    return tuple(sources)


def _subject(plan: calibration.Plan, model: str, source: calibration.Source) -> dict[str, str]:
    """What the results of a data set are of: another run goes on with them where all of it is the same."""
    return {
        "model": model,
        "dtype": plan.dtype,
        "dataset": source.fingerprint,
        "metric": source.metric,
        "scope": plan.scope,
        "max_new_tokens": str(plan.max_new_tokens),
        "max_pixels": str(plan.max_pixels),
    }


def _told(report: calibration.CalibrationReport) -> tuple[RenderableType, ...]:
    """The weights, and what they are worth, for a terminal."""
    heads = len(report.values)
    drops_on = [f"drop on {dataset.name}" for dataset in report.datasets]
    shown = table("head", "weight", "95 %", "x uniform", *drops_on)
    for head, (weight, (low, high)) in enumerate(zip(report.values, report.intervals, strict=True)):
        drops = [f"{100 * dataset.drops[head]:+.2f}" for dataset in report.datasets]
        shown.add_row(str(head), f"{weight:.4f}", f"[{low:.4f}, {high:.4f}]", f"{weight * heads:.2f}", *drops)
    lines = []
    for dataset in report.datasets:
        told = "" if dataset.weights is not None else "; no head matters more than another: it has no say"
        whole = f"{dataset.metric} {100 * dataset.baseline:.2f} % whole"
        lines.append(f"{dataset.name}: {dataset.samples} questions, {whole}{told}")
    return (shown, *lines, _verdict(report))


def _verdict(report: calibration.CalibrationReport) -> str:
    """Whether the weights mean anything, in a sentence."""
    p_value = f"p = {report.uniform_p_value:.4f}"
    if report.differs_from_uniform:
        return f"The heads differ: heads that all matter alike would seldom look so ({p_value}, permutation test)."
    return (
        f"These weights cannot be told from uniform ones: heads that all matter alike often look so ({p_value}, "
        "permutation test). Prune with uniform weights, or calibrate with more questions: a larger --count goes on."
    )
