"""A checkpoint folder as far as prompts need it: tokenizer, chat template, image settings; and its fingerprint.

No weight is loaded here. The fingerprint says which model results are of, on any machine: it does not depend on
the folder's name or on times.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from hawk_trt.bundle import SCHEMA_VERSION, Bundle, HeadWeights, Manifest, Source, TableEntry
from hawk_trt.errors import CheckpointError
from hawk_trt.request import PruningConfig

from .architectures import read_config
from .checkpoint_files import (
    CONFIG,
    GENERATION_CONFIG,
    added_tokens,
    read_json,
    read_small_files,
    stop_tokens,
)
from .tensor_file import read_tensor_file

# Of each tensor, from its start and from its end: training changes every part of a tensor that it changes.
_SAMPLED_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class CheckpointBundle(Bundle):
    """A checkpoint in the form of a bundle without graphs, which is all that a processor asks for."""

    texts: dict[str, str]  # its small files by name

    def read_text(self, name: str) -> str | None:
        """Text of a small file, None where there is none."""
        return self.texts.get(name)


def open_checkpoint(folder: Path, hub_id: str | None = None) -> CheckpointBundle:
    """Read the small files of a checkpoint, and its fingerprint.

    Args:
        folder: where it lies.
        hub_id: where it was downloaded from, which then is its name; None names it by its folder.

    Raises:
        CheckpointError: no checkpoint there, one that is not supported, or one without a tokenizer.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG} there, expected a checkpoint folder, or a hub id: hawk-trt calibrate OWNER/NAME"
        )
    config = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    added = added_tokens(folder)
    model = read_config(config, generation, added)
    contents = read_small_files(folder, model.chat_template).contents
    if "tokenizer.json" not in contents:
        raise CheckpointError(
            f"{folder}: no tokenizer.json there, so it cannot answer questions. If it has vocab.json, write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    architecture = (config.get("architectures") or [str(config.get("model_type"))])[0]
    heads, tokens = model.language.num_attention_heads, model.special_tokens
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(hub_id or folder.resolve().name, architecture, _fingerprint(folder, contents)),
        dtype="float32",
        normalization="l2",
        targets=(),
        language=model.language,
        vision=model.vision,
        graphs=(),
        embeddings=TableEntry("", 0, "float32", (0, 0)),
        special_tokens=replace(tokens, eos=stop_tokens(folder, tokens.eos, added)),
        keep_ratio=PruningConfig().keep_ratio,
        head_weights=HeadWeights((1.0 / heads,) * heads, "uniform"),
        files={},
        versions={},
    )
    return CheckpointBundle(folder, manifest, {name: _text(folder / name, raw) for name, raw in contents.items()})


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error})") from error


def _fingerprint(folder: Path, contents: dict[str, bytes]) -> str:
    """The sha256 of the small files, and of each tensor's name, dtype, shape, first and last bytes."""
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors there")
    for path in files:
        found = read_tensor_file(path)
        digest.update(path.name.encode() + found.header)
        try:
            with path.open("rb") as file:
                for tensor in sorted(found.tensors, key=lambda tensor: tensor.name):
                    end = tensor.offset + tensor.nbytes
                    for place in (tensor.offset, max(tensor.offset, end - _SAMPLED_BYTES)):
                        file.seek(place)
                        digest.update(file.read(min(_SAMPLED_BYTES, end - place)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
