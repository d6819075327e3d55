"""The export: a checkpoint folder becomes a bundle.

In: a checkpoint, where the bundle goes, and options. Out: the bundle, written whole or not at all: graphs are built
first and every tensor accounted for; then files go to a folder beside the destination, bundle.json last; then the
folders are swapped. An export that would change nothing does nothing.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from hawk_trt import __version__
from hawk_trt.bundle import (
    MANIFEST,
    REFERENCE,
    SCHEMA_VERSION,
    Bundle,
    HeadWeights,
    Manifest,
    Source,
    TableEntry,
    WeightFormat,
    file_entry,
    manifest_bytes,
    manifest_digest,
)
from hawk_trt.errors import BundleError, CheckpointError, InvalidInput
from hawk_trt.files.staging import check_free_space, check_replaceable, clean_up_after_killed, staged
from hawk_trt.models import load_family
from hawk_trt.request import PruningConfig, check_head_weights
from hawk_trt.stages import CPU, CUDA, DTYPES, NORMALIZATIONS, TARGETS, LanguageConfig

from .architectures import read_config
from .checkpoint import Checkpoint
from .checkpoint_files import SMALL_FILES, added_tokens, read_small_files, stop_tokens
from .head_weights import default_head_weights
from .quantisation import BLOCK_SIZES, WEIGHT_BITS, WHOLE_ROW
from .tensors import EMBEDDINGS, LM_HEAD

_BUNDLE_SUFFIXES = (".onnx", ".data", ".safetensors")
# For graphs and small files, beside the weights.
_SPARE_BYTES = 64 << 20
_NAMES_SHOWN = 8
# Beside a language model that is whole: heads of reward and value models, and layers that draft the tokens to come.
_TRAINING_HEADS = ("v_head.", "value_head.", "score.", "reward_head.", "rm_head.", "regression_layer.")
_LEFT_OUT = {
    _TRAINING_HEADS: "a head of training (reward or value), which is",
    ("mtp.",): "layers that draft later tokens, which are",
}
# ONNX Runtime's CPU provider has no bfloat16 kernels, and its CUDA provider none that makes bfloat16 of integers.
_CANNOT_RUN = {(CPU, "bfloat16", False), (CPU, "bfloat16", True), (CUDA, "bfloat16", True)}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        dtype: of activations, and of weights that are not quantised; scores are float32 in any.
        targets: that the bundle holds graphs for, over the same weights; empty takes all that run the dtype.
        normalization: of the scores, baked into the graphs.
        link: hard-link the checkpoint's files instead of copying them; needs their dtype.
        im_end_token_id: instead of the checkpoint's; with the next, it bounds the query range.
        vision_end_token_id: instead of the checkpoint's.
        head_weights: the bundle's default; None takes the released ones where they fit, else uniform ones.
        force: export again even if nothing changed.
        weights: how the language model's matrices are quantised; None leaves them in the dtype.

    Raises:
        InvalidInput: a value that is not supported.
    """

    dtype: str = "float32"
    targets: tuple[str, ...] = ()
    normalization: str = "l2"
    link: bool = False
    im_end_token_id: int | None = None
    vision_end_token_id: int | None = None
    head_weights: HeadWeights | None = None
    force: bool = False
    weights: WeightFormat | None = None

    def __post_init__(self) -> None:
        quantised = self.weights is not None
        runnable = tuple(target for target in TARGETS if (target, self.dtype, quantised) not in _CANNOT_RUN)
        targets = self.targets or runnable
        kind = f"quantised weights with {self.dtype}" if quantised else self.dtype
        for name, got, allowed in (
            ("dtype", (self.dtype,), DTYPES),
            (f"targets of {kind}", targets, runnable),
            ("normalization", (self.normalization,), NORMALIZATIONS),
        ):
            if not got or not set(got) <= set(allowed):
                raise InvalidInput(f"{name}: got {', '.join(map(str, got))}, expected of {', '.join(allowed)}")
        if self.weights is not None:
            _check_weights(self.weights, link=self.link)
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in targets))


def _check_weights(weights: WeightFormat, *, link: bool) -> None:
    sizes = (*BLOCK_SIZES, WHOLE_ROW) if weights.bits == 8 else BLOCK_SIZES
    for name, got, allowed in (("bits", weights.bits, WEIGHT_BITS), ("block_size", weights.block_size, sizes)):
        if got not in allowed:
            raise InvalidInput(f"weights: {name}: got {got}, expected one of {', '.join(map(str, allowed))}")
    if link:
        raise InvalidInput(
            f"link: got int{weights.bits} weights, which are made from the checkpoint's and cannot be its own files. "
            "Drop --link, or give --dtype float32, float16 or bfloat16"
        )


def export(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Bundle:
    """Export a checkpoint, or return the bundle that is there if it is up to date.

    Args:
        checkpoint: a Hugging Face checkpoint folder, or one that is open.
        out: the bundle's folder; a bundle that is there is replaced at the end.
        options: None takes the defaults.
        name: of the checkpoint, as the manifest says it; None takes the folder's.
        progress: called with the bytes of weights done and their total.
        note: called with each sentence about the checkpoint that its user should know.

    Raises:
        CheckpointError: a checkpoint that cannot be read or is not supported.
        InvalidInput: head weights that do not fit the model.
        BundleError: out cannot be replaced or written, or the disk is full.
    """
    options = options or ExportOptions()
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    out = Path(out).resolve()
    _check_replaceable(out, opened.folder)
    clean_up_after_killed(out)
    plan = planned(opened, options, name)
    current = None if options.force else _as_planned(plan, out)
    if current is not None:
        return current
    # onnx takes a while to load, which no run of a bundle that is up to date has to wait for
    from .graphs import build_graphs
    from .weights import WeightStore

    template = read_config(opened.config).chat_template
    weights = WeightStore(opened, options.dtype, options.link, options.weights, plan.language.scoring_layer)
    sides = (plan.vision, plan.language, weights, options.dtype)
    graphs = [
        graph for target in plan.targets for graph in build_graphs(*sides, target, options.normalization).values()
    ]
    table = weights.table((plan.language.vocab_size, plan.language.hidden_size))
    notes = _account_for_all(opened, plan.language)
    if opened.quantisation is not None:
        notes += opened.quantisation.notes(options.dtype, plan.targets)
    advice = "Free space, choose another disk with --out, or use --link where dtypes match"
    check_free_space(out, weights.disk_bytes + _SPARE_BYTES, "the bundle needs", advice)
    with staged(out) as folder, weights.writing(folder, progress) as finish:
        files = {}
        small = read_small_files(opened.folder, template)
        for file_name, content in small.contents.items():
            (folder / file_name).write_bytes(content)
            files[file_name] = file_entry(folder / file_name)
        from .prompts import try_prompts  # what it loads takes a while as well, and weights are being written

        tried = try_prompts(Bundle(folder, replace(plan, files=files)), load_family(plan.vision))
        for sentence in (*notes, *small.notes, *tried):
            if note is not None:
                note(sentence)
        for graph in graphs:
            file = folder / graph.entry.file
            file.write_bytes(graph.model().SerializeToString())
            files[file.name] = file_entry(file)
        files |= finish()
        manifest = replace(plan, graphs=tuple(graph.entry for graph in graphs), embeddings=table, files=files)
        with (folder / MANIFEST).open("wb") as out_file:
            out_file.write(manifest_bytes(manifest))
            out_file.flush()
            os.fsync(out_file.fileno())
    return Bundle.load(out)


def up_to_date(checkpoint: Checkpoint, out: Path, options: ExportOptions, name: str | None = None) -> Bundle | None:
    """The intact bundle at out, if an export with these options would write the same again.

    Raises:
        CheckpointError: a checkpoint that is not supported.
        InvalidInput: head weights that do not fit the model.
    """
    return _as_planned(planned(checkpoint, options, name), out)


def _as_planned(plan: Manifest, out: Path) -> Bundle | None:
    """The intact bundle at out, if it is what the plan says."""
    try:
        bundle = Bundle.load(out)
    except BundleError:
        return None
    written = replace(bundle.manifest, graphs=(), embeddings=plan.embeddings, files={})
    return bundle if manifest_digest(written) == manifest_digest(plan) else None


def planned(checkpoint: Checkpoint, options: ExportOptions, name: str | None) -> Manifest:
    """The manifest as far as it is known before a graph is built."""
    quantisation = checkpoint.quantisation
    if quantisation and (options.link or options.weights):
        raise InvalidInput(
            f"{checkpoint.folder}: its weights are quantised ({quantisation.method}) and stored as they are, so they "
            "can be neither linked nor quantised again. Give --dtype float32, float16 or bfloat16, of the activations, "
            "without --link"
        )
    added = added_tokens(checkpoint.folder)
    model = read_config(checkpoint.config, checkpoint.generation, added)
    language, tokens = model.language, model.special_tokens
    tokens = replace(tokens, eos=stop_tokens(checkpoint.folder, tokens.eos, added))
    head_weights = options.head_weights or default_head_weights(model.vision.family, language)
    check_head_weights(head_weights.values, language.num_attention_heads)
    architecture = (checkpoint.config.get("architectures") or [str(checkpoint.config.get("model_type"))])[0]
    for flag, token_id in (("im_end", options.im_end_token_id), ("vision_end", options.vision_end_token_id)):
        if token_id is not None and not 0 <= token_id < language.vocab_size:
            raise InvalidInput(f"{flag}_token_id: got {token_id}, expected 0 to {language.vocab_size - 1}")
    if options.im_end_token_id is not None:
        tokens = replace(tokens, im_end=options.im_end_token_id)
    if options.vision_end_token_id is not None:
        tokens = replace(tokens, vision_end=options.vision_end_token_id)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(
            name or checkpoint.folder.resolve().name,
            architecture,
            checkpoint.fingerprint(SMALL_FILES),
            options.link,
            quantisation.told if quantisation else "",
        ),
        dtype=options.dtype,
        normalization=options.normalization,
        targets=options.targets,
        language=language,
        vision=model.vision,
        graphs=(),
        embeddings=TableEntry("", 0, options.dtype, (0, 0)),
        special_tokens=tokens,
        keep_ratio=PruningConfig().keep_ratio,
        head_weights=head_weights,
        files={},
        versions=_versions(),
        weights=quantisation.weights if quantisation else options.weights,
    )


def _account_for_all(checkpoint: Checkpoint, language: LanguageConfig) -> list[str]:
    """Refuse tensors that no graph reads; a tied checkpoint may repeat its embeddings as lm_head.weight.

    Returns:
        Notes on the parts that answers do not need, and that are left out.
    """
    unused = checkpoint.unused()
    if language.tie_word_embeddings and LM_HEAD in unused:
        if not checkpoint.same_values(LM_HEAD, EMBEDDINGS):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {LM_HEAD} differs from {EMBEDDINGS}, yet config.json ties them "
                "(tie_word_embeddings). Set it to false if the head was trained on its own, else delete the tensor"
            )
        unused.remove(LM_HEAD)
    notes = []
    for prefixes, what in _LEFT_OUT.items():
        if found := [name for name in unused if name.startswith(prefixes)]:
            notes.append(f"{_shown(found)}: {what} left out")
            unused = [name for name in unused if name not in found]
    if unused:
        raise CheckpointError(f"{checkpoint.folder}: {len(unused)} tensors that no graph reads: {_shown(unused)}")
    return notes


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _check_replaceable(out: Path, checkpoint: Path) -> None:
    """Refuse to replace anything but a bundle, or the checkpoint itself."""
    if checkpoint.resolve().is_relative_to(out):
        raise BundleError(f"{out}: holds the checkpoint that is to be exported. Choose another folder with --out")
    replaces = (out / MANIFEST).is_file()
    check_replaceable(
        out,
        lambda name: (
            replaces and (name in (MANIFEST, REFERENCE, *SMALL_FILES) or Path(name).suffix in _BUNDLE_SUFFIXES)
        ),
        "export",
    )


def _versions() -> dict[str, str]:
    """What writes the bundle: packages, and a digest of this code, which moves faster than its version."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(path.relative_to(here).as_posix().encode() + path.read_bytes())
    return {"hawk_trt": __version__, "export": digest.hexdigest()[:16], "onnx": metadata.version("onnx")}
