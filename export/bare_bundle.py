"""A checkpoint folder as far as prompts need it: tokenizer, chat template, image settings; and its fingerprint.

No weight is loaded here. The fingerprint says which model results are of, on any machine: it does not depend on
the folder's name or on times.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from hawk_trt.bundle import Bundle
from hawk_trt.errors import CheckpointError

from .architectures import read_config
from .checkpoint import Checkpoint
from .checkpoint_files import CONFIG, GENERATION_CONFIG, TOKENIZER, as_text, json_object, read_json, read_small_files
from .tensor_file import read_tensor_file
from .writer import ExportOptions, planned

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

    hub_id: where it was downloaded from, which then is its name; None names it by its folder.

    Raises:
        CheckpointError: no checkpoint there, one that is not supported, or one without a tokenizer.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG} there, expected a checkpoint folder, or a hub id: hawk-trt calibrate OWNER/NAME"
        )
    config, generation = read_json(folder / CONFIG), json_object(folder, GENERATION_CONFIG)
    contents = read_small_files(folder, read_config(config).chat_template).contents
    if TOKENIZER not in contents:
        raise CheckpointError(
            f"{folder}: no tokenizer.json there, so it cannot answer questions. If it has vocab.json, write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    manifest = planned(Checkpoint(folder, config, generation, (), {}), ExportOptions(), hub_id)
    source = replace(manifest.source, fingerprint=_fingerprint(folder, contents))
    texts = {name: as_text(folder / name, raw) for name, raw in contents.items()}
    manifest = replace(manifest, source=source, targets=(), versions={})
    return CheckpointBundle(folder, manifest, texts)


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
