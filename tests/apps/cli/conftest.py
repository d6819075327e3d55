"""A question that the tiny model answers."""

import json

import pytest


@pytest.fixture(scope="module")
def sample(tiny_checkpoint):
    """A picture, a question about it, and its answer."""
    entry = json.loads((tiny_checkpoint / "samples" / "samples.json").read_text())[0]
    return tiny_checkpoint / "samples" / entry["image"], entry["question"], entry["answer"]


@pytest.fixture
def ask(tiny_bundle, sample):
    """The arguments of a `run` that works."""
    image, question, _ = sample
    return ["run", str(tiny_bundle), "--image", str(image), "--prompt", question]
