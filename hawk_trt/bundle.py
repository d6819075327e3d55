"""The bundle: the folder an export writes and every backend reads.

    bundle.json                     this manifest
    vision.<target>.onnx           graphs; their weights lie in *.data files beside them,
    first_layer.<target>.onnx      shared by all targets (or, linked, in the checkpoint's
    decoder.<target>.onnx          own safetensors files)
    config.json, tokenizer.json, chat_template.jinja, preprocessor_config.json, ...
    reference.npz                   what the stages make of a few prompts in float32, where that was run

Graphs and small files are hashed at every load, weight files by size at load and by hash on request:
hashing 16 GB at each start would cost more than loading the model.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.files import read_json, xxh3_file
from hawk_trt.models.vision_config import AnyVision
from hawk_trt.request import check_head_weights
from hawk_trt.stages import DTYPES, LanguageConfig

MANIFEST = "bundle.json"
REFERENCE = "reference.npz"
ENGINES_MANIFEST = "engines.json"
SCHEMA_VERSION = 6
_AGAIN = "Export again: hawk-trt export CHECKPOINT --out FOLDER"
_Versioned = TypeVar("_Versioned")
_TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Size: TypeAlias = Annotated[int, msgspec.Meta(gt=0)]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle: XXH3-128 in hex, its size, and whether it holds weights."""

    xxh3: str
    size_bytes: int
    weights: bool = False


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One graph input or output: dtype name and shape, dynamic dimensions by their word."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """One .onnx file."""

    stage: str
    target: str
    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class TableEntry:
    """Where the token embedding table [vocab_size, hidden_size] lies, row-major."""

    file: str
    offset: Annotated[int, msgspec.Meta(ge=0)]
    dtype: Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(DTYPES)})$")]
    shape: tuple[_Size, _Size]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that the runtime must know, None or empty for none; vision_end and im_end bound the query range."""

    image: _TokenId | None
    video: _TokenId | None
    vision_start: _TokenId | None
    vision_end: _TokenId | None
    im_start: _TokenId | None
    im_end: _TokenId | None
    pad: _TokenId | None
    eos: tuple[_TokenId, ...]


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The default head weights and where they came from."""

    values: tuple[float, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint a bundle was made from.

    fingerprint: sha256 over configs, and names, sizes, times and headers of the weight files. quantisation: how its
    matrices are quantised, a line to read, empty where all are floats.
    """

    name: str
    architecture: str
    fingerprint: str
    linked: bool = False
    quantisation: str = ""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the language model's matrices are stored where they are no floats.

    bits: of each integer, 4 or 8. block_size: so many of them along a matrix's input share one scale; 0 for all of a
    row.
    """

    bits: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """bundle.json.

    dtype: of all graph inputs, outputs and activations, and of the weights but for the matrices that `weights`
    describes.
    """

    schema_version: int
    source: Source
    dtype: str
    normalization: str
    targets: tuple[str, ...]
    language: LanguageConfig
    vision: AnyVision
    graphs: tuple[GraphEntry, ...]
    embeddings: TableEntry
    special_tokens: SpecialTokens
    keep_ratio: float
    head_weights: HeadWeights
    files: dict[str, FileEntry]
    versions: dict[str, str]
    weights: WeightFormat | None = None

    @property
    def family(self) -> str:
        return self.vision.family

    @property
    def precision(self) -> str:
        """The dtype as it is shown: "float32", or "int4 weights in blocks of 64, float32"."""
        if self.weights is None:
            return self.dtype
        shared = f"in blocks of {self.weights.block_size}" if self.weights.block_size else "with a scale a row"
        return f"int{self.weights.bits} weights {shared}, {self.dtype}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers that keep them."""
        language = self.language
        full = language.num_hidden_layers - language.num_linear_layers
        numbers = 2 * full * language.num_key_value_heads * language.head_dim
        return numbers * numpy_dtype(self.dtype).itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all linear layers, whatever the number of tokens; 0 without such layers."""
        linear = self.language.linear
        if linear is None:
            return 0
        numbers = self.language.num_linear_layers * sum(math.prod(shape) for shape in linear.state_shapes)
        return numbers * np.dtype(np.float32).itemsize

    def cache_bytes(self, columns: int) -> int:
        """Bytes of what a prompt of so many tokens leaves: keys, values and states."""
        return columns * self.kv_bytes_per_token + self.state_bytes

    def graph(self, stage: str, target: str) -> GraphEntry:
        """The graph of a stage for a target; BundleError where the bundle does not hold it."""
        for entry in self.graphs:
            if (entry.stage, entry.target) == (stage, target):
                return entry
        raise BundleError(
            f"target: got {target!r}, this bundle holds {', '.join(self.targets)}. Export again with --target {target}"
        )


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest and the folder it describes."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> "Bundle":
        """Read and check a bundle; see read_manifest and check."""
        folder = Path(folder)
        bundle = cls(folder, read_manifest(folder))
        bundle.check(verify=verify, progress=progress)
        return bundle

    def check(self, *, verify: bool = False, progress: Callable[[int], None] | None = None) -> None:
        """Compare all files with the manifest: weights by size, or by hash with verify; progress gets bytes hashed."""
        check_files(self.folder, self.manifest.files, "the export", _AGAIN, verify=verify, progress=progress)
        try:
            check_head_weights(self.manifest.head_weights.values, self.manifest.language.num_attention_heads)
        except InvalidInput as error:
            raise BundleError(f"{self.folder}: damaged, {error}. {_AGAIN}") from error
        table, files = self.manifest.embeddings, self.manifest.files
        stray = {table.file, *(graph.file for graph in self.manifest.graphs)} - files.keys()
        if stray:
            raise BundleError(
                f"{self.folder}: damaged, {', '.join(sorted(stray))[:200]} does not belong to it. {_AGAIN}"
            )
        if table.offset + table.nbytes > files[table.file].size_bytes:
            raise BundleError(f"{self.folder}: damaged, the embeddings reach beyond {table.file}. {_AGAIN}")

    def read_text(self, name: str) -> str | None:
        """Text of a small file of the bundle, None where it has none."""
        return (self.folder / name).read_text(encoding="utf-8") if name in self.manifest.files else None

    def embedding_table(self) -> npt.NDArray[Any]:
        """The memory-mapped token embedding table [vocab_size, hidden_size]; bfloat16 through ml_dtypes."""
        entry = self.manifest.embeddings
        return np.memmap(
            self.folder / entry.file, dtype=numpy_dtype(entry.dtype), mode="r", offset=entry.offset, shape=entry.shape
        )


def read_manifest(folder: Path) -> Manifest:
    """Read bundle.json; BundleError where there is none, a damaged one, or one of another schema."""
    is_checkpoint = any(folder.glob("*.safetensors"))
    source, out = (folder, f"{folder}-bundle") if is_checkpoint else ("CHECKPOINT-OR-HUB-ID", folder)
    command = f"hawk-trt export {source} --out {out}"
    absent = f"{folder}: no bundle there ({MANIFEST} is missing). Make one: {command}"
    return read_versioned(folder / MANIFEST, Manifest, SCHEMA_VERSION, absent, "the export", _AGAIN)


def read_versioned(path: Path, kind: type[_Versioned], expected: int, absent: str, made: str, again: str) -> _Versioned:
    """Read a manifest, of a bundle or of the engines built from one; `expected` is the one schema that it reads.

    absent: the error where there is no file.  made: what wrote it, such as "the export".  again: the command that
    writes it anew, as a sentence. Raises BundleError: not there, damaged, changed, or of another schema.
    """
    if not path.is_file():
        raise BundleError(absent)
    fields = read_json(path, dict[str, Any], BundleError, again)
    version = fields.get("schema_version")
    if isinstance(version, int) and version != expected:
        advice = f"Update hawk_trt, or with this version: {again}" if version > expected else again
        raise BundleError(f"{path}: schema version {version}, this hawk_trt reads {expected}. {advice}")
    # of the text, not of the manifest: a field that is newer than the file takes its default without breaking it
    told = fields.pop("manifest_sha256", None)
    try:
        manifest = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: damaged ({error}). {again}") from error
    if hashlib.sha256(msgspec.json.encode(fields)).hexdigest() != told:
        raise BundleError(f"{path}: its content changed since {made} (its hash differs). {again}")
    return manifest


def manifest_bytes(manifest: object) -> bytes:
    """A manifest as written: indented, and with its own sha256."""
    fields = msgspec.to_builtins(manifest)
    fields["manifest_sha256"] = manifest_digest(manifest)
    return msgspec.json.format(msgspec.json.encode(fields), indent=1)


def manifest_digest(manifest: object) -> str:
    """The sha256 of a manifest's compact JSON."""
    return hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()


def check_files(
    folder: Path,
    files: Mapping[str, FileEntry],
    made: str,
    again: str,
    *,
    verify: bool,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compare files with their manifest: by size and hash, weights by size alone unless verify.

    made, again: as in read_versioned. progress is called with the bytes hashed. Raises BundleError: one is missing or
    differs.
    """
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or "\0" in name:
            raise BundleError(
                f"{folder}: damaged, it names the file {name[:200]!r}, expected names without folders. {again}"
            )
        if not path.is_file():
            raise BundleError(f"{path}: missing. {again}")
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise BundleError(f"{path}: got {size_bytes} bytes, expected {entry.size_bytes}. {again}")
        if (verify or not entry.weights) and xxh3_file(path, progress) != entry.xxh3:
            raise BundleError(f"{path}: its content changed since {made} (its hash differs). {again}")


def file_entry(path: Path, *, weights: bool = False, progress: Callable[[int], None] | None = None) -> FileEntry:
    """What a manifest says of a file that is written; progress is called with the bytes hashed."""
    return FileEntry(xxh3_file(path, progress), path.stat().st_size, weights)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a dtype name, those that numpy lacks through ml_dtypes."""
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes  # only such bundles and checkpoints need it

        name = getattr(ml_dtypes, name)
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def holds_engines(folder: Path) -> bool:
    """Whether a folder holds TensorRT engines, and not the graphs of a bundle."""
    return (folder / ENGINES_MANIFEST).is_file()
