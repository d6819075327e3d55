"""A Hugging Face checkpoint folder: its configs, and every tensor under one canonical name.

In: a folder with config.json and safetensors, one file or shards with their index. Out: configs as dicts and
where each tensor lies. All generations of names become visual.*, language_model.* and lm_head.weight, so that the
graphs know one; see export.tensors.
Which tensors were asked for is remembered: one that nobody reads means a graph that misses something.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hawk_trt.errors import CheckpointError

from .checkpoint_files import CONFIG, GENERATION_CONFIG, json_object, read_json
from .formats import MODELOPT, PLAIN, Quantisation, checked_method, method_of, quantisation_settings, read_matrices
from .tensor_file import CheckpointTensor, TensorFile, read_tensor_file
from .tensors import LM_HEAD, tensor_names

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Of Cosmos 3 the language model and the vision tower lie apart, in the folders of Diffusers.
_PARTS = ("transformer", "vision_encoder")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_SETTINGS = "quantization_config"
# In the names of what PEFT wraps.
_PEFT = re.compile(r"^base_model\.model\.|\.(base_layer|lora_\w+|modules_to_save)\.")
# Buffers that some checkpoints hold and that config.json determines.
_COMPUTED = (".inv_freq", ".original_inv_freq", ".position_ids", ".masked_bias")


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint that was opened and checked; no weight has been read yet."""

    folder: Path  # it lies in
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json, empty where there is none
    files: tuple[TensorFile, ...]  # the safetensors files, by name
    tensors: dict[str, CheckpointTensor] = field(repr=False)  # by canonical name
    quantisation: Quantisation | None = None  # how its matrices are quantised, None where all are plain floats
    _used: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read the configs and the headers of all weight files.

        Raises:
            CheckpointError: no folder, config or safetensors there, a damaged or missing file, a tensor given
                twice, or a quantised format that is not read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder, expected a Hugging Face checkpoint")
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: no {CONFIG} there, expected the folder of a Hugging Face checkpoint")
        config = read_json(folder / CONFIG)
        generation = json_object(folder, GENERATION_CONFIG)
        settings = quantisation_settings(folder, config)
        try:
            files = _weight_files(folder)
        except CheckpointError:
            if settings:  # pickled, or of dtypes that nothing here knows: the format says what to do
                checked_method(settings)
            raise
        tensors, quantisation = read_matrices(_canonical_tensors(files, tensor_names(config)), settings)
        if settings and quantisation is None:
            raise CheckpointError(
                f"{folder / CONFIG}: {_SETTINGS} (quant_method {method_of(settings)}) is left over: the weights "
                "beside it are plain floats. Delete the key from config.json, or hf_quant_config.json"
            )
        return cls(folder, config, generation, files, tensors, quantisation)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> CheckpointTensor:
        """The tensor of a canonical name, and of a shape if one is given; it counts as used from now on.

        Raises:
            CheckpointError: there is none, or it has another shape.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f" The nearest are {', '.join(near)}." if near else ""
            if name == LM_HEAD and not near:
                hint = " If the embeddings are its head too, say tie_word_embeddings: true there"
            raise CheckpointError(f"{self.folder}: no tensor {name}, which {CONFIG} asks for.{hint}")
        tensor = self.tensors[name]
        if shape not in (None, tensor.shape):
            raise CheckpointError(
                f"{tensor.file}: tensor {name}: shape {list(tensor.shape)}, {CONFIG} asks for {list(shape or ())}"
            )
        self._used.add(name)
        return tensor

    def unused(self) -> list[str]:
        """Canonical names of the tensors that nobody asked for, sorted."""
        return sorted(self.tensors.keys() - self._used)

    def same_values(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and elements."""
        one, other = self.tensors[first], self.tensors[second]
        return one.shape == other.shape and all(
            np.array_equal(*blocks) for blocks in zip(one.blocks(), other.blocks(), strict=True)
        )

    def fingerprint(self, extra_files: tuple[str, ...] = ()) -> str:
        """The sha256, in hex, of the small files and of each weight file's name, size, time and header.

        extra_files: names of more small files of the folder; one that is missing counts as missing.
        """
        digest = hashlib.sha256()
        for name in (CONFIG, GENERATION_CONFIG, MODELOPT, *extra_files):
            path = self.folder / name
            content = path.read_bytes() if path.is_file() else b""
            digest.update(f"{name} {path.is_file()} {len(content)}\n".encode() + content)
        for file in self.files:
            status = file.path.stat()
            digest.update(f"{file.path.name} {status.st_size} {status.st_mtime_ns} {len(file.header)}\n".encode())
            digest.update(file.header)
        return digest.hexdigest()


def _weight_files(folder: Path) -> tuple[TensorFile, ...]:
    """The safetensors files of a folder, in the order in which transformers looks for them."""
    if (folder / _SINGLE).is_file():
        return (read_tensor_file(folder / _SINGLE),)
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    if parts := [path for part in _PARTS for path in sorted((folder / part).glob("*.safetensors"))]:
        return tuple(read_tensor_file(path) for path in parts)
    shards = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if not shards:
        raise CheckpointError(_no_weights(folder))
    count = _SHARD.fullmatch(shards[0].name)
    assert count is not None  # it was chosen by this pattern
    digits, total = count.groups()
    for number in range(1, int(total) + 1):
        expected = f"model-{number:0{len(digits)}d}-of-{total}.safetensors"
        if not (folder / expected).is_file():
            raise CheckpointError(f"{folder / expected}: missing, one of {int(total)} shards. Download it again")
    return tuple(read_tensor_file(path) for path in shards)


def _indexed_files(folder: Path) -> tuple[TensorFile, ...]:
    """The shards named by the index; which tensor it places where does not count, as in transformers."""
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map, expected tensor names and their files")
    for name in weight_map.values():
        place, _, own = str(name).rpartition("/")
        if not isinstance(name, str) or place not in ("", *_PARTS) or Path(own).name != own or len(name) > 200:
            parts = " or ".join(_PARTS)
            raise CheckpointError(
                f"{index}: got the file {str(name)[:80]!r}, expected a name without folders, or in {parts}"
            )
        if "\0" in name:
            raise CheckpointError(f"{index}: got the file {name[:80]!r}, which no file is called")
    files: list[TensorFile] = []
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, {index.name} names it. Download it again")
        files.append(read_tensor_file(folder / name))
    return tuple(files)


def _no_weights(folder: Path) -> str:
    """What to do about a folder without safetensors of a model."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: a PEFT adapter, expected a whole model. Merge it first: "
            "model.merge_and_unload().save_pretrained(NEW_DIR)"
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickled:
        return (
            f"{folder}: no safetensors, only {', '.join(pickled[:3])}. Convert with transformers: "
            "AutoModelForImageTextToText.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{folder}: no weights there, expected {_SINGLE} or {_INDEX} with its shards"


def _canonical_tensors(
    files: tuple[TensorFile, ...], names: Callable[[str], tuple[str, ...]]
) -> dict[str, CheckpointTensor]:
    """All tensors by canonical name."""
    tensors: dict[str, CheckpointTensor] = {}
    for file in files:
        for tensor in file.tensors:
            named = names(tensor.name)
            if not named or tensor.name.endswith(_COMPUTED):
                continue
            if _PEFT.search(tensor.name):
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.name}: saved from inside PEFT. Merge the adapter and save the model: "
                    "model.merge_and_unload().save_pretrained(NEW_DIR)"
                )
            for part in _parts(tensor, named):
                if part.name in tensors:
                    first = tensors[part.name].file.name
                    raise CheckpointError(
                        f"{file.path}: tensor {tensor.name}: given twice, {first} holds {part.name} too"
                    )
                tensors[part.name] = part
    return tensors


def _parts(tensor: CheckpointTensor, names: tuple[str, ...]) -> Iterator[CheckpointTensor]:
    """The tensor under its canonical name, or its rows in equal parts under several."""
    if len(names) > 1 and (tensor.dtype not in PLAIN or not tensor.shape):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: part of quantised weights, in one for {', '.join(names)}, which "
            "cannot be taken apart. Take a checkpoint whose vision tower is not quantised"
        )
    rows, left = divmod(tensor.shape[0], len(names)) if len(names) > 1 else (0, 0)
    if left:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: shape {list(tensor.shape)}, "
            f"expected rows in {len(names)} equal parts"
        )
    nbytes = tensor.nbytes // len(names)
    for number, name in enumerate(names):
        shape = (rows, *tensor.shape[1:]) if len(names) > 1 else tensor.shape
        yield replace(tensor, name=name, offset=tensor.offset + number * nbytes, nbytes=nbytes, shape=shape)
