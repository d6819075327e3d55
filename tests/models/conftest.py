"""The small Qwen checkpoints, each made once."""

import pytest

from qwen import RandomQwen


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory):
    """Gives the checkpoint of a family by the family's name."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made = {}

    def of(name):
        if name not in made:
            made[name] = RandomQwen(name, tmp_path_factory.mktemp(name))
        return made[name]

    yield of
    for qwen in made.values():
        qwen.close()
