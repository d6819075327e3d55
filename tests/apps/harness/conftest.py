"""A pipeline, questions for it, and its answers."""

import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import generate
from harness_questions import PRUNING
from hawk_trt import Pipeline


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def samples():
    return list(generate(11, 4))


@pytest.fixture(scope="module")
def expected(pipe, samples):
    return [pipe.generate(s.question, [s.image], pruning=PRUNING, max_new_tokens=8).text for s in samples]


@pytest.fixture
def video(tmp_path):
    """A file of 11 frames."""
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)) for number in range(11)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return str(tmp_path / "clip.gif")
