"""A checkpoint of a released model's shape whose weights are random, made while they are read.

In: a config. Out: a Checkpoint that exports like any other and takes no disk: for measuring speed and memory where
the weights are not at hand. Answers are nonsense; a seed and a config give the same weights on every machine.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from .architectures import read_config
from .checkpoint import Checkpoint
from .checkpoint_files import CONFIG, GENERATION_CONFIG
from .graphs import inventory
from .tensor_file import CheckpointTensor, alternating_buffers

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class RandomTensor(CheckpointTensor):
    """A tensor of no file: normally distributed, 1 in norms, else of a size that keeps activations near 1."""

    seed: int  # of the whole checkpoint

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The elements: 1-D float32 arrays of a few MB at most, each valid until the next but one."""
        left = math.prod(self.shape)
        random = np.random.default_rng((self.seed, crc32(self.name.encode())))
        is_norm = len(self.shape) == 1 and self.name.endswith(".weight")
        scale = np.float32(0.02 if len(self.shape) == 1 else 1 / math.sqrt(math.prod(self.shape[1:])))
        for buffer in alternating_buffers(left, _FLOAT32):
            block = buffer[:left]
            random.standard_normal(dtype=np.float32, out=block)
            block *= scale
            if is_norm:
                block += 1
            yield block
            left -= len(block)
            if not left:
                return


def random_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights; CheckpointError for a config that is not supported.

    folder: gets config.json and generation_config.json, nothing else.  config: config.json, with what ends an answer as
    eos_token_id.  seed: of the weights.
    """
    config = config | {"random_weights_seed": seed}  # so that a bundle of another seed is not up to date
    generation = {"eos_token_id": config["eos_token_id"]}
    for name, content in ((CONFIG, config), (GENERATION_CONFIG, generation)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    model = read_config(config)
    shapes = inventory(model.language, model.vision)
    tensors: dict[str, CheckpointTensor] = {
        name: RandomTensor(name, folder / CONFIG, 0, math.prod(shape) * 4, "float32", shape, seed)
        for name, shape in shapes.items()
    }
    return Checkpoint(folder, config, generation, (), tensors)
