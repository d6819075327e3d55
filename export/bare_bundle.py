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
from .checkpoint_files import TOKENIZER, as_text, read_small_files
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
    opened = Checkpoint.open(folder)
    contents = read_small_files(folder, read_config(opened.config).chat_template).contents
    if TOKENIZER not in contents:
        raise CheckpointError(
            f"{folder}: no tokenizer.json there, so it cannot answer questions. If it has vocab.json, write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    manifest = planned(opened, ExportOptions(), hub_id)
    source = replace(manifest.source, fingerprint=_fingerprint(opened, contents))
    texts = {name: as_text(folder / name, raw) for name, raw in contents.items()}
    manifest = replace(manifest, source=source, targets=(), versions={})
    return CheckpointBundle(folder, manifest, texts)


def _fingerprint(checkpoint: Checkpoint, contents: dict[str, bytes]) -> str:
    """The sha256 of the small files, and of each tensor's name, dtype, shape, first and last bytes."""
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for found in checkpoint.files:
        digest.update(found.path.name.encode() + found.header)
        try:
            with found.path.open("rb") as file:
                for tensor in found.tensors:
                    end = tensor.offset + tensor.nbytes
                    for place in (tensor.offset, max(tensor.offset, end - _SAMPLED_BYTES)):
                        file.seek(place)
                        digest.update(file.read(min(_SAMPLED_BYTES, end - place)))
        except OSError as error:
            raise CheckpointError(f"{found.path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
