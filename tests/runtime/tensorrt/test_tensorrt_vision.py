"""Frames of one size and tiles share calls of the vision plan, as many as it was built for."""

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import Pipeline
from hawk_trt.errors import BackendError
from trt_machine import Machines, engine_folder

SAMPLES = list(generate(16, 7))


@pytest.fixture(autouse=True)
def machines():
    with Machines() as machines:
        yield machines
        assert machines.driver.faults == []


def assert_alike(plans, bundle, images):
    got, expected = (pipe.generate("What is red?", images, max_new_tokens=3) for pipe in (plans, bundle))
    assert got.token_ids == expected.token_ids
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_images_of_one_size_share_calls_and_others_have_their_own(tiny_bundle, tmp_path, machines, target):
    folder = engine_folder(
        tiny_bundle, tmp_path / "engines", target, max_visual_tokens=600, max_prompt_tokens=700, max_context=700
    )
    images = [s.image for s in SAMPLES[:5]] + [np.tile(SAMPLES[5].image, (2, 2, 1)), SAMPLES[6].image[:112]]
    with Pipeline.load(folder, vision_cache_mb=0) as plans, Pipeline.load(tiny_bundle, threads=1) as bundle:
        assert_alike(plans, bundle, images)
        # four of 64 tokens together, then the fifth, one too large for the second profile, and one of 32
        assert [label for label in machines.trt.enqueues if label[0] == "vision"] == [
            *[("vision", 1)] * 2,
            *[("vision", 0)] * 2,
        ]


def test_an_image_larger_than_every_profile_is_refused_with_the_option(tiny_bundle, tmp_path):
    folder = engine_folder(tiny_bundle, tmp_path / "engines", "tensorrt", max_visual_tokens=64, max_prompt_tokens=100)
    with Pipeline.load(folder) as plans, pytest.raises(BackendError, match="--max-visual-tokens"):
        plans.generate("What is red?", [np.tile(SAMPLES[0].image, (2, 2, 1))], max_new_tokens=2)
