"""Pipelines of the tiny model."""

import pytest

from hawk_trt import Pipeline
from targets import ON_CPU


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, tiny_bundle):
    with Pipeline.load(tiny_bundle, target=request.param, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def inplace(tiny_bundle):
    with Pipeline.load(tiny_bundle, target="cpu", threads=1) as pipe:
        yield pipe
