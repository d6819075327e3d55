"""A small random checkpoint and its bundle."""

import pytest

from checkpoints import make_checkpoint, random_tensors
from export.writer import export


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tensors)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, checkpoint):
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "out")
