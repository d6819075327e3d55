"""`hawk-trt calibrate`: how much each query head matters, measured by leaving it out; a weights file at the end."""

import argparse
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from rich.console import Console

from hawk_trt.apps.calibrate.work import FIRST_LAYER, SCOPES, Plan, Scores, Source, score_table, units_left
from hawk_trt.apps.cli import options
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.cli.progress import progress
from hawk_trt.apps.evaluate.datasets import TINY, load_dataset
from hawk_trt.apps.evaluate.metrics import METRICS
from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.checkpoint_files import download, is_hub_id
from hawk_trt.stages import DTYPES

SUMMARY = "measure how much each query head matters, by leaving it out (needs torch)"


def add_parser(subparsers: "options.Subparsers[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = options.add_command(subparsers, "calibrate", SUMMARY)
    parser.add_argument("checkpoint", help="a checkpoint folder, or a hub id such as owner/name")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--dataset",
        action="append",
        help=f"{TINY} (the task of the shipped model), a JSONL file, or a folder with samples.jsonl, a line being "
        '{"image": "a.png", "question": "...", "answer": "..."}; repeatable, each has the same say '
        f"(default: {TINY})",
    )
    group.add_argument(
        "--metric", action="append", choices=METRICS, help="of all data sets, or one of each (default: exact-match)"
    )
    group.add_argument("--count", type=int, help=f"of each data set (default: all of a file, 100 of {TINY})")
    group.add_argument("--seed", type=int, default=0, help="of the samples' order (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    group.add_argument("--max-pixels", type=int, help="shrink larger images to this area (default: the checkpoint's)")
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--scope",
        choices=SCOPES,
        default=FIRST_LAYER,
        help="leave the head out of layer 0, or the head of that number out of every layer (default: %(default)s)",
    )
    group.add_argument(
        "--keep-ratio",
        type=float,
        default=1.0,
        help="share of visual tokens, chosen with equal heads; 1 measures the unpruned model, as the paper does "
        "(default: %(default)s)",
    )
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", default="cpu", help="of torch (default: %(default)s)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    group.add_argument(
        "--heads-at-once", type=int, default=8, help="answers side by side; fewer need less memory (default: 8)"
    )
    group.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="N workers on a Ray cluster, each on a GPU of its own with --device cuda",
    )
    group.add_argument(
        "--ray-address", help="of the cluster (default: RAY_ADDRESS, else one on this machine, started if need be)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, default=Path("head-weights.json"), metavar="FILE", help="weights (default: %(default)s)"
    )
    group.add_argument(
        "--work",
        type=Path,
        default=Path("calibration"),
        metavar="DIR",
        help="every answer, which the next run goes on with (default: %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="print the weights file")


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet, and weigh.

    Raises:
        HawkError: the checkpoint, a data set or an option cannot be used, or the results there are of something else.
    """
    # torch, when missing, is said before anything is read
    from hawk_trt.apps.parity.reference import Reference  # isort: skip
    from hawk_trt.apps.calibrate.checkpoint import open_checkpoint
    from hawk_trt.apps.calibrate.importance import importance
    from hawk_trt.apps.calibrate.report import make_report, tell, verdict, write_report
    from hawk_trt.apps.calibrate.shards import do_here, do_on_ray

    for name in ("heads_at_once", "shards"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidInput(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    names = [name if name == TINY else str(Path(name).resolve()) for name in args.dataset or [TINY]]
    metrics = args.metric or ["exact-match"]
    if len(metrics) not in (1, len(names)):
        raise InvalidInput(f"--metric: got {len(metrics)} for {len(names)} data sets, expected one, or one of each")
    metrics = metrics * (len(names) // len(metrics))
    hub_id = args.checkpoint if is_hub_id(args.checkpoint) else None
    if args.revision is not None and hub_id is None:
        raise InvalidInput(f"--revision: only for a hub id (owner/name), got {args.checkpoint}")
    datasets = [load_dataset(name, args.count, args.seed) for name in names]
    sources = [
        Source(Path(name).stem or name, tuple(dataset), dataset.fingerprint, args.seed, metric, METRICS[metric])
        for name, dataset, metric in zip(names, datasets, metrics, strict=True)
    ]
    plan = Plan(
        checkpoint=Path(args.checkpoint).resolve(),
        sources=tuple(sources),
        scope=args.scope,
        load=Reference.load,
        special_tokens=prompt_tokens,
        keep_ratio=args.keep_ratio,
        max_new_tokens=args.max_new_tokens,
        max_pixels=args.max_pixels,
        dtype=args.dtype,
        device=args.device,
    )
    if hub_id:  # after all that could be wrong without it
        note(f"{hub_id}: downloading what is not in the Hugging Face cache of this machine")
        plan = replace(plan, checkpoint=download(hub_id, args.revision))
    bundle = open_checkpoint(plan.checkpoint, hub_id)
    num_heads = bundle.manifest.language.num_attention_heads
    with ExitStack() as stack:
        logs = [
            stack.enter_context(
                closing(
                    ResultLog(
                        args.work / f"{source.name}.jsonl",
                        _subject(args, bundle.manifest.source.fingerprint, source),
                        Scores,
                        option="--work",
                        sync=True,
                    )
                )
            )
            for source in plan.sources
        ]
        left = list(units_left(plan, [log.records for log in logs], num_heads, args.heads_at_once))
        questions = sum(len(source.questions) for source in plan.sources)
        total, to_go = questions * (1 + num_heads), sum(len(unit.heads) for unit in left)
        note(f"{total} answers: {num_heads} heads and the whole model; {total - to_go} known in {args.work}")
        if left:
            done = do_on_ray(plan, left, args.shards, args.ray_address) if args.shards else do_here(plan, left)
            for unit, scores in progress(done, len(left), f"units of up to {args.heads_at_once} answers"):
                logs[unit.source].append(scores)
        tables = [score_table(source, log.records, num_heads) for source, log in zip(plan.sources, logs, strict=True)]
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    report = make_report(plan, bundle.manifest.source, tables, importance(tables), versions)
    write_report(report, args.out)
    if args.json:
        print_json(report)
    else:
        Console().print(tell(report), highlight=False)
    note(f"weights: {args.out}. Use them: --head-weights {args.out}, here or in python -m export")
    if not report.differs_from_uniform and args.json:
        note(verdict(report))
    return 0


def _subject(args: argparse.Namespace, model: str, source: Source) -> dict[str, str]:
    """What the results of a data set are of: another run goes on with them where all of it is the same."""
    return {
        "model": model,
        "dtype": args.dtype,
        "dataset": source.fingerprint,
        "metric": source.metric,
        "scope": args.scope,
        "keep_ratio": f"{args.keep_ratio:g}",
        "max_new_tokens": str(args.max_new_tokens),
        "max_pixels": str(args.max_pixels),
    }
