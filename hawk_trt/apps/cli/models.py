"""What a user may name as a model: a bundle, engines, or a checkpoint, which is exported first, once."""

import hashlib
import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Literal

import hawk_trt
from hawk_trt.apps.cli.main import where_it_lies
from hawk_trt.apps.cli.mistakes import WrongModel
from hawk_trt.apps.cli.output import note, progress, size
from hawk_trt.apps.cli.vocabulary import IMAGES
from hawk_trt.bundle import ENGINES_MANIFEST, MANIFEST, Bundle, Manifest, WeightFormat, holds_engines, read_manifest
from hawk_trt.engine_folder import EngineFolder, read_engine_manifest
from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.files import cache_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configs, tokenizer and chat template; not the pickled copies, images and papers that lie beside them.
_HUB_FILES = ["model*.safetensors", "transformer/*.safetensors", "vision_encoder/*.safetensors", "*.json", "*.jinja"]
_CONFIG = "config.json"  # of a checkpoint
Kind = Literal["bundle", "engines", "checkpoint", "hub id", "nothing"]
_KINDS: dict[str, Kind] = {ENGINES_MANIFEST: "engines", MANIFEST: "bundle", _CONFIG: "checkpoint"}
TINY = "tiny"  # names the model that comes along
INTEGERS = ("int4", "int8")  # dtypes of weights alone
BLOCK_SIZE = 64
_ADDRESS = re.compile(r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_CHECKPOINT = "the folder of a Hugging Face checkpoint or a hub id"
_MODELS = "a bundle, engines, a checkpoint or a hub id"


def is_hub_id(checkpoint: str) -> bool:
    """Whether the argument names a hub repository (owner/name) rather than a folder that is there."""
    return not Path(checkpoint).exists() and _HUB_ID.fullmatch(checkpoint) is not None


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a hub checkpoint; files already in the cache are not downloaded again."""
    try:
        from huggingface_hub import errors, snapshot_download  # only hub ids need it
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: no such folder, and a download needs huggingface_hub. Install it: pip install huggingface_hub"
        ) from error
    at = f"{hub_id}, revision {revision}" if revision else hub_id
    try:
        snapshot_download(hub_id, revision=revision, allow_patterns=_CONFIG)  # who cannot reach it is told that alone
        note(f"{hub_id}: a hub id. Downloading what is not in the Hugging Face cache of this machine")
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{at}: access must be granted on its page first; then log in: hf auth login") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such folder, and the hub cannot be reached. Download it where there is a network "
            f"(hf download {hub_id} --local-dir DIR) and give the folder"
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{at}: no such folder, and the hub says: {first_line}") from error


def kind_of(name: str | Path) -> Kind:
    """What a name stands for, by the manifest that lies there."""
    for file, kind in _KINDS.items():
        if (Path(name) / file).is_file():
            return kind
    return "hub id" if is_hub_id(str(name)) and not _close_to(Path(name)) else "nothing"


def ready(model: Path, dtype: str | None = None) -> Path:
    """The folder to load: the one that is named, or that of a checkpoint's bundle in the user's cache.

    dtype: that a checkpoint is exported in, None for float32; that of a bundle must be it.
    """
    if str(model) == TINY and not model.exists():
        model = tiny_checkpoint()
    kind = kind_of(model)
    if kind == "nothing":
        raise _no_model(str(model), _MODELS)
    if kind in ("bundle", "engines"):
        found = manifest_of(model).precision if dtype else None
        if found not in (None, dtype):
            raise InvalidInput(
                f"--dtype {dtype}: {model} is {found}. Leave --dtype out, or export the checkpoint in it: "
                f"hawk-trt export CHECKPOINT-OR-HUB-ID --dtype {dtype} --out {model}-{dtype}"
            )
        return model
    dtype = dtype or "float32"
    name = str(model) if kind == "hub id" else str(model.resolve())
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    folder = cache_folder() / "bundles" / f"{Path(name).name}-{dtype}-{digest}"
    # imported by name, since they lie inside hawk_trt once installed, and only a checkpoint needs them
    writer = import_module(where_it_lies("export.writer"))
    source = download(name) if kind == "hub id" else Path(name)
    opened = import_module(where_it_lies("export.checkpoint")).Checkpoint.open(source)
    weights = WeightFormat(int(dtype.removeprefix("int")), BLOCK_SIZE) if dtype in INTEGERS else None
    options = writer.ExportOptions(dtype="float32" if weights else dtype, weights=weights)
    given = name if kind == "hub id" else None
    if writer.up_to_date(opened, folder, options, given) is None:
        held = size(sum(file.stat().st_size for file in source.glob("*.safetensors")))
        note(f"{model}: a checkpoint of {held}. Exporting it in {dtype}, once (another one: --dtype)")
        with progress("of weights", in_bytes=True) as show:
            written = writer.export(opened, folder, options, name=given, progress=show).manifest
        note(f"{folder}: exported, {size(sum(entry.size_bytes for entry in written.files.values()))}")
    return folder


def tiny_checkpoint() -> Path:
    """The tiny model: inside the package once installed, beside it in a checkout."""
    package = Path(hawk_trt.__file__).parent
    installed = package / "data" / "tiny_vlm"
    return installed if installed.is_dir() else package.parent / "examples" / "tiny-vlm"


def expect_checkpoint(name: str, *, compared: bool = False) -> None:
    """Refuse all but a checkpoint's folder and a hub id; compared: the one of a bundle is asked for, none to export."""
    kind = kind_of(name)
    if compared and kind in ("bundle", "engines"):
        source = manifest_of(Path(name)).source.name
        if not Path(source).exists() and not is_hub_id(source):
            source = "CHECKPOINT-OR-HUB-ID"
        raise WrongModel(f"{name}: {kind}, expected a checkpoint, such as the one it was made from", name, source)
    if kind == "bundle":
        raise WrongModel(
            f"{name}: a bundle, which is exported already. Ask it, or build engines: "
            f"hawk-trt build {name} --out {name}-engines",
            command=f"hawk-trt run {name} --prompt TEXT",
        )
    if kind == "engines":
        raise WrongModel(f"{name}: engines, expected a checkpoint", command=f"hawk-trt run {name} --prompt TEXT")
    if kind == "nothing":
        raise _no_model(name, _CHECKPOINT)


def expect_exported(name: Path, *, built: bool = True) -> None:
    """Refuse all but a bundle and, where they may be built already, engines."""
    kind = kind_of(name)
    if kind == "engines" and not built:
        message = f"{name}: engines, which are built already"
        raise WrongModel(message, command=f"hawk-trt run {name} --prompt TEXT")
    if kind in ("checkpoint", "hub id"):
        command = f"hawk-trt export {name} --out {name.name}-bundle"
        what = "a checkpoint" if kind == "checkpoint" else "no such folder, or the id of a checkpoint"
        raise WrongModel(f"{name}: {what}, expected a bundle or engines", command=command)
    if kind == "nothing":
        raise _no_model(str(name), "a bundle or engines")


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a bundle, or of the one that engines were built from."""
    return read_engine_manifest(folder).bundle if holds_engines(folder) else read_manifest(folder)


def verify(folder: Path) -> None:
    """Read every file of a bundle or engine folder and compare its hash with the manifest."""
    files = dict(manifest_of(folder).files)
    if holds_engines(folder):
        files |= read_engine_manifest(folder).files
    total_bytes, done = sum(entry.size_bytes for entry in files.values()), 0
    note(f"verifying {len(files)} files, {size(total_bytes)}")
    with progress("verified", in_bytes=True) as show:

        def hashed(count: int) -> None:
            nonlocal done
            done += count
            show(done, total_bytes)

        kind = EngineFolder if holds_engines(folder) else Bundle
        kind.load(folder, verify=True, progress=hashed)


def _no_model(name: str, expected: str) -> WrongModel:
    """What lies in the place of a model, and what was meant, as far as that can be seen."""
    path, address = Path(name), _ADDRESS.match(name)
    instead = "BUNDLE" if expected == "a bundle or engines" else "CHECKPOINT-OR-HUB-ID"
    if address:
        return WrongModel(f"{name}: a web address, expected {expected}", name, address[1])
    if path.is_file():
        if path.suffix.lower() in IMAGES:
            command = f"hawk-trt run MODEL --image {name} --prompt TEXT"
            return WrongModel(f"{name}: an image, expected {expected}", name, command=command)
        if kind_of(path.parent) != "nothing":
            return WrongModel(f"{name}: a file, expected the folder that it lies in", name, str(path.parent))
        why = "GGUF holds no checkpoint that is read here" if path.suffix == ".gguf" else "a file"
        return WrongModel(f"{name}: {why}, expected {expected}", name, instead)
    if path.is_dir():
        inside = [place for below in ("*", "snapshots/*") for file in _KINDS for place in path.glob(f"{below}/{file}")]
        if inside:
            places = sorted({str(place.parent) for place in inside})
            return WrongModel(f"{name}: no model itself; it holds {', '.join(places[:4])}", name, places[0])
        if (path / "adapter_config.json").is_file():
            return WrongModel(
                f"{name}: an adapter, expected {expected}. Merge it into its model first (PEFT's merge_and_unload)"
            )
        if expected == _CHECKPOINT:
            return WrongModel(f"{name}: no {_CONFIG} there, expected {expected}", name, "OWNER/NAME")
        return WrongModel(
            f"{name}: no bundle there ({MANIFEST} is missing), expected {expected}",
            command=f"hawk-trt export CHECKPOINT-OR-HUB-ID --out {name}",
        )
    close = _close_to(path)
    if close:
        return WrongModel(f"{name}: no such folder. Did you mean {close}?", name, str(close))
    message = f"{name}: no such folder, expected {expected}"
    if re.fullmatch(r"Qwen[\w.]*-[\w.-]+", name):  # a hub id has an owner
        return WrongModel(f"{message} such as Qwen/{name}", name, f"Qwen/{name}")
    return WrongModel(message, name, instead)


def _close_to(path: Path) -> Path | None:
    """The model whose path was probably meant."""
    around = [*path.parent.glob("*"), *(Path("artifacts").glob("*") if len(path.parts) == 1 else ())]
    models = {folder.name.lower(): folder for folder in around if any((folder / file).is_file() for file in _KINDS)}
    found = get_close_matches(path.name.lower(), models, n=1, cutoff=0.7)
    return models[found[0]] if found else None
