"""The command python -m export: a checkpoint, local or from the hub, becomes a bundle."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hawk_trt.bundle import Bundle, WeightFormat
from hawk_trt.errors import HawkError
from hawk_trt.inputs.checkpoint_files import download, is_hub_id
from hawk_trt.pipeline import Pipeline
from hawk_trt.pruning.head_weights import read_head_weights
from hawk_trt.runtime.reference import REFERENCE, Reference
from hawk_trt.runtime.versions import available_memory_bytes
from hawk_trt.stages import DTYPES, NORMALIZATIONS, TARGETS

from .checkpoint import Checkpoint
from .head_weights import UNIFORM
from .quantisation import BLOCK_SIZES, WEIGHT_BITS
from .random_checkpoint import random_checkpoint
from .real_shapes import SHAPES, shape_config
from .writer import ExportOptions, export, up_to_date

_FAILED = 1
_INTERRUPTED = 130
_UNIFORM_NOTE = (
    "note: no head weights are published for this model, so all its query heads count the same. "
    "Measure them: hawk-trt calibrate CHECKPOINT --out FILE, then export with --head-weights FILE"
)
_INTEGERS = {f"int{bits}": bits for bits in WEIGHT_BITS}
_BLOCK_SIZE = 64
# That a run of a few prompts takes beside the weights.
_RUN_BYTES = 1 << 30
# Between two lines where no bar can be drawn.
_PLAIN_SECONDS = 2.0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that are None: the help says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(arguments: list[str] | None = None, prog: str = "python -m export") -> int:
    """Run the command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = _parser(prog)
    args = parser.parse_args(arguments)
    if (args.checkpoint is None) == (args.shape is None):
        parser.error("expected a CHECKPOINT, or --shape for one of random weights")
    if args.revision is not None and (args.shape or not is_hub_id(args.checkpoint)):
        parser.error(f"--revision: only for a hub id (owner/name), got {args.shape or args.checkpoint}")
    if args.shape and args.link:
        parser.error("--link: random weights lie in no file")
    if not args.shape and (args.layers or args.vision_layers):
        parser.error("--layers, --vision-layers: only with --shape; a checkpoint has its own")
    if args.dtype not in _INTEGERS and (args.activations or args.block_size):
        parser.error(f"--activations, --block-size: only with --dtype {' or '.join(_INTEGERS)}, got {args.dtype}")
    if args.dtype in _INTEGERS and args.link:
        parser.error(f"--link: {args.dtype} weights are made from the checkpoint's, so they cannot be its own files")
    try:
        if args.shape:
            _run_shape(args)
        else:
            name = args.checkpoint if is_hub_id(args.checkpoint) else None
            _run(args, Checkpoint.open(download(name, args.revision) if name else args.checkpoint), name)
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run_shape(args: argparse.Namespace) -> None:
    """Export random weights of a released model's shape."""
    config = shape_config(args.shape, args.layers, args.vision_layers)
    if args.im_end_token_id is None:
        args.im_end_token_id = config["eos_token_id"]  # <|im_end|>; there is no tokenizer to say it
    with tempfile.TemporaryDirectory() as folder:
        _run(args, random_checkpoint(Path(folder), config), f"{args.shape}, random weights")


def _run(args: argparse.Namespace, checkpoint: Checkpoint, name: str | None) -> None:
    start = time.perf_counter()
    bits = _INTEGERS.get(args.dtype)
    options = ExportOptions(
        dtype=args.dtype if bits is None else args.activations or "float32",
        weights=None if bits is None else WeightFormat(bits, args.block_size or _BLOCK_SIZE),
        targets=tuple(target for given in args.target or () for target in given),
        normalization=args.normalization,
        link=args.link,
        im_end_token_id=args.im_end_token_id,
        vision_end_token_id=args.vision_end_token_id,
        head_weights=read_head_weights(args.head_weights) if args.head_weights else None,
        force=args.force,
    )
    current = None if args.force else up_to_date(checkpoint, args.out.resolve(), options, name)
    if current is None:
        notes: list[str] = []
        with _progress() as progress:
            bundle = export(checkpoint, args.out, options, name=name, progress=progress, note=notes.append)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if bundle.manifest.head_weights.source == UNIFORM:
            print(_UNIFORM_NOTE, file=sys.stderr)
    else:
        bundle = current
    if not args.shape and not args.no_reference:
        bundle = _with_reference(bundle)
    _report(bundle, args.out, time.perf_counter() - start, up_to_date=current is not None, as_json=args.json)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Export a Hugging Face checkpoint to an ONNX bundle.",
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint folder, or a hub id such as owner/name"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *_INTEGERS),
        default="float32",
        help="of weights and activations; int8 and int4: of the language model's matrices (docs/quantised.md)",
    )
    parser.add_argument(
        "--activations", choices=DTYPES, help="dtype of all else beside int8 and int4 weights (default: float32)"
    )
    parser.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help=f"of int8 and int4 weights: how many share a scale (default: {_BLOCK_SIZE})",
    )
    parser.add_argument(
        "--target",
        type=_targets,
        action="append",
        metavar="T[,T]",
        help=f"what runs the graphs: {', '.join(TARGETS)}; repeatable (default: all that run the dtype)",
    )
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="l2", help="of the scores of a head")
    parser.add_argument("--link", action="store_true", help="hard-link the checkpoint's files, copying nothing")
    parser.add_argument(
        "--im-end-token-id", type=int, metavar="N", help="ends the query range, instead of the tokenizer's <|im_end|>"
    )
    parser.add_argument(
        "--vision-end-token-id", type=int, metavar="N", help="starts the query range, instead of the checkpoint's"
    )
    parser.add_argument(
        "--head-weights", type=Path, metavar="FILE", help="JSON: importance of each query head of layer 0"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of a released model's shape instead, to measure speed with"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of --shape, fewer than the model's")
    parser.add_argument("--vision-layers", type=int, metavar="N", help="of --shape, fewer than the model's")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help=f"do not run a float32 bundle to write {REFERENCE}, which engines are compared with",
    )
    parser.add_argument("--force", action="store_true", help="export again even if nothing changed")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _with_reference(bundle: Bundle) -> Bundle:
    """The bundle with what its stages make of a few prompts, where ONNX Runtime can run it here in float32."""
    manifest = bundle.manifest
    if REFERENCE in manifest.files or manifest.dtype != "float32" or find_spec("onnxruntime") is None:
        return bundle
    needed_bytes = sum(entry.size_bytes for entry in manifest.files.values() if entry.weights) + _RUN_BYTES
    free_bytes = available_memory_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        why = f"that takes {needed_bytes / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free"
    else:
        try:
            with Pipeline.load(bundle.folder) as pipe:
                Reference.make(pipe).put_into(bundle.folder)
            return Bundle.load(bundle.folder)
        except HawkError as error:
            why = str(error)
    print(f"note: {REFERENCE}, which engines are compared with, was not made: {why}", file=sys.stderr)
    return bundle


def _targets(given: str) -> list[str]:
    """Targets of a comma list."""
    targets = given.split(",")
    for target in targets:
        if target not in TARGETS:
            raise argparse.ArgumentTypeError(f"got {target!r}, expected of {', '.join(TARGETS)}")
    return targets


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else plain lines; both on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress() -> Callable[[int, int], None]:
    printed_at = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at > _PLAIN_SECONDS:
            printed_at = time.monotonic()
            print(f"weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    return show


def _report(bundle: Bundle, out: Path, seconds: float, *, up_to_date: bool, as_json: bool) -> None:
    """Print the result on stdout."""
    manifest = bundle.manifest
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    if as_json:
        result = {
            "folder": str(out),
            "up_to_date": up_to_date,
            "family": manifest.family,
            "dtype": manifest.dtype,
            "weights": None if manifest.weights is None else asdict(manifest.weights),
            "targets": manifest.targets,
            "normalization": manifest.normalization,
            "linked": manifest.source.linked,
            "head_weights": manifest.head_weights.source,
            "size_bytes": size_bytes,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result))
        return
    what = "up to date, nothing written (--force exports again)" if up_to_date else f"exported in {seconds:.1f} s"
    linked = ", weights linked" if manifest.source.linked else ""
    print(f"{out}: {what}")
    print(
        f"  {manifest.family}, {manifest.precision}, for {', '.join(manifest.targets)}, "
        f"{size_bytes / 1e9:.3f} GB{linked}"
    )
    print(f"  normalization {manifest.normalization}, head weights: {manifest.head_weights.source}")


if __name__ == "__main__":
    sys.exit(main())
