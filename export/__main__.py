"""The command `hawk-trt export`, in a checkout also python -m export: a checkpoint becomes a bundle."""

import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from hawk_trt.apps.cli.main import INTERRUPTED, make_app, run_app
from hawk_trt.apps.cli.models import BLOCK_SIZE, INTEGERS, download, expect_checkpoint, is_hub_id
from hawk_trt.apps.cli.options import Json, dtypes, names
from hawk_trt.apps.cli.output import note, print_json, progress, size
from hawk_trt.bundle import REFERENCE, Bundle, WeightFormat
from hawk_trt.errors import HawkError
from hawk_trt.pruning.head_weights import read_head_weights
from hawk_trt.runtime.versions import available_memory_bytes
from hawk_trt.stages import CUDA, NORMALIZATIONS, TARGETS

from .checkpoint import Checkpoint
from .head_weights import UNIFORM
from .quantisation import BLOCK_SIZES, WHOLE_ROW
from .real_shapes import SHAPES, shape_config
from .writer import ExportOptions, export, up_to_date

_UNIFORM_NOTE = (
    "note: no head weights are published for this model, so all its query heads count the same. "
    "Measure them: hawk-trt calibrate CHECKPOINT --out FILE, then export with --head-weights FILE"
)
_HYBRID_NOTE = (
    "note: the first layers of this model have no attention, so HAWK scores behind them. In the one hybrid that was "
    "measured, a tiny one, the prompt's last token chose better there than the paper's query: compare "
    "--query last with the default on your own questions (hawk-trt eval)"
)
# That a run of a few prompts takes beside the weights.
_RUN_BYTES = 1 << 30


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    app = make_app("python -m export", command=export_checkpoint)
    return run_app(app, sys.argv[1:] if arguments is None else arguments)


def export_checkpoint(
    checkpoint: Annotated[str | None, Parameter(alias="--model")] = None,
    *,
    out: Path,
    dtype: Annotated[str, dtypes(*INTEGERS)] = "float32",
    activations: Annotated[str | None, dtypes()] = None,
    block_size: Annotated[int | None, Parameter(choices=tuple(map(str, (*BLOCK_SIZES, WHOLE_ROW))))] = None,
    target: Annotated[tuple[str, ...], names(TARGETS)] = (),
    normalization: Annotated[str, Parameter(choices=NORMALIZATIONS)] = "l2",
    link: bool = False,
    im_end_token_id: int | None = None,
    vision_end_token_id: int | None = None,
    head_weights: Path | None = None,
    shape: Annotated[str | None, Parameter(choices=tuple(SHAPES))] = None,
    layers: int | None = None,
    vision_layers: int | None = None,
    revision: str | None = None,
    no_reference: bool = False,
    force: bool = False,
    json: Json = False,
) -> int:
    """Turn a Hugging Face checkpoint into a bundle of ONNX graphs.

    Example: hawk-trt export Qwen/Qwen2.5-VL-3B-Instruct --out artifacts/3b --dtype fp16

    Args:
        checkpoint: a checkpoint folder, or a hub id such as owner/name
        out: the bundle's folder
        dtype: dtype of weights and activations; int8 and int4 quantise the language model (docs/quantised.md)
        activations: dtype of all else beside int8 and int4 weights (default: float32; float16 for target cuda alone)
        block_size: int8 and int4 weights that share a scale (default: 64); 0 for a whole row of int8, as TensorRT wants
        target: what the graphs are for: cpu, cuda, tensorrt, portable, with commas between them (default: all that can)
        normalization: how the scores of a head are normalised
        link: hard-link the checkpoint's files instead of copying their weights
        im_end_token_id: token that ends the question, for checkpoints without a tokenizer
        vision_end_token_id: token after which the question begins (default: the checkpoint's)
        head_weights: JSON file with a weight for each query head of layer 0
        shape: instead of a checkpoint, random weights in a released model's shape, to measure speed
        layers: with --shape, number of language layers
        vision_layers: with --shape, number of vision layers
        revision: branch, tag or commit of a hub id
        no_reference: do not run a float32 bundle once to make reference.npz, with which engines are compared
        force: export again even if nothing changed
        json: print the result as JSON
    """
    for wrong, message in (
        ((checkpoint is None) == (shape is None), "expected a CHECKPOINT, or --shape for one of random weights"),
        (
            revision is not None and (checkpoint is None or not is_hub_id(checkpoint)),
            f"--revision: only for a hub id (owner/name), got {shape or checkpoint}",
        ),
        (shape and link, "--link: random weights lie in no file"),
        (
            not shape and (layers or vision_layers),
            "--layers, --vision-layers: only with --shape; a checkpoint has its own",
        ),
        (
            dtype not in INTEGERS and (activations is not None or block_size is not None),
            f"--activations, --block-size: only with --dtype {' or '.join(INTEGERS)}, got {dtype}",
        ),
    ):
        if wrong:
            raise CycloptsError(msg=f"{message}.")
    bits = int(dtype.removeprefix("int")) if dtype in INTEGERS else None
    options = ExportOptions(
        dtype=dtype if bits is None else activations or ("float16" if target == (CUDA,) else "float32"),
        weights=None if bits is None else WeightFormat(bits, BLOCK_SIZE if block_size is None else block_size),
        targets=target,
        normalization=normalization,
        link=link,
        im_end_token_id=im_end_token_id,
        vision_end_token_id=vision_end_token_id,
        head_weights=read_head_weights(head_weights) if head_weights else None,
        force=force,
    )
    try:
        start = time.perf_counter()
        if shape is not None:
            from .random_checkpoint import random_checkpoint  # onnx comes with it, which an up-to-date bundle needs not

            config = shape_config(shape, layers, vision_layers)
            if im_end_token_id is None:  # <|im_end|>; there is no tokenizer to say it
                options = replace(options, im_end_token_id=config["eos_token_id"])
            with tempfile.TemporaryDirectory() as folder:
                made = random_checkpoint(Path(folder), config)
                bundle, current = _bundle(made, out, options, f"{shape}, random weights")
        else:
            assert checkpoint is not None
            expect_checkpoint(checkpoint)
            name = checkpoint if is_hub_id(checkpoint) else None
            opened = Checkpoint.open(download(name, revision) if name else checkpoint)
            bundle, current = _bundle(opened, out, options, name)
            bundle = bundle if no_reference else _with_reference(bundle)
    except KeyboardInterrupt:
        note("interrupted; nothing was changed")
        return INTERRUPTED
    _report(bundle, out, time.perf_counter() - start, up_to_date=current, as_json=json)
    return 0


def _bundle(checkpoint: Checkpoint, out: Path, options: ExportOptions, name: str | None) -> tuple[Bundle, bool]:
    current = None if options.force else up_to_date(checkpoint, out.resolve(), options, name)
    if current is not None:
        return current, True
    notes: list[str] = []
    with progress("of weights", in_bytes=True) as show:
        bundle = export(checkpoint, out, options, name=name, progress=show, note=notes.append)
    for told in notes:
        note(f"note: {told}")
    if bundle.manifest.head_weights.source == UNIFORM:
        note(_UNIFORM_NOTE)
    if bundle.manifest.language.scoring_layer:
        note(_HYBRID_NOTE)
    return bundle, False


def _with_reference(bundle: Bundle) -> Bundle:
    """The bundle with what its stages make of a few prompts, where ONNX Runtime can run it here in float32."""
    manifest = bundle.manifest
    if REFERENCE in manifest.files or manifest.dtype != "float32" or find_spec("onnxruntime") is None:
        return bundle
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.runtime.reference import Reference

    needed_bytes = sum(entry.size_bytes for entry in manifest.files.values() if entry.weights) + _RUN_BYTES
    free_bytes = available_memory_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        why = f"that takes {size(needed_bytes)} of memory, {size(free_bytes)} are free"
    else:
        try:
            with Pipeline.load(bundle.folder) as pipe:
                Reference.make(pipe).put_into(bundle.folder)
            return Bundle.load(bundle.folder)
        except HawkError as error:
            why = str(error)
    note(f"note: {REFERENCE}, which engines are compared with, was not made: {why}")
    return bundle


def _report(bundle: Bundle, out: Path, seconds: float, *, up_to_date: bool, as_json: bool) -> None:
    manifest = bundle.manifest
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    if as_json:
        result = {
            "folder": str(out),
            "up_to_date": up_to_date,
            "family": manifest.family,
            "dtype": manifest.dtype,
            "weights": manifest.weights,
            "quantisation": manifest.source.quantisation,
            "targets": manifest.targets,
            "normalization": manifest.normalization,
            "linked": manifest.source.linked,
            "head_weights": manifest.head_weights.source,
            "size_bytes": size_bytes,
            "seconds": round(seconds, 3),
        }
        print_json(result)
        return
    what = "up to date, nothing written (--force exports again)" if up_to_date else f"exported in {seconds:.1f} s"
    linked = ", weights linked" if manifest.source.linked else ""
    print(f"{out}: {what}")
    print(f"  {manifest.family}, {manifest.precision}, for {', '.join(manifest.targets)}, {size(size_bytes)}{linked}")
    if manifest.source.quantisation:
        print(f"  read: {manifest.source.quantisation}")
    print(f"  normalization {manifest.normalization}, head weights: {manifest.head_weights.source}")


if __name__ == "__main__":
    sys.exit(main())
