"""A GPU and TensorRT for each test, both stand-ins, and engines of the tiny model."""

import gc

import pytest

from trt_machine import Machines, engine_folder


@pytest.fixture(scope="session")
def engines(tiny_bundle, tmp_path_factory):
    """Engines of the tiny bundle: read them, never write to them."""
    return engine_folder(tiny_bundle, tmp_path_factory.mktemp("engines") / "tiny", "tensorrt")


@pytest.fixture
def machines():
    """The stand-ins, on which a test leaves nothing behind."""
    with Machines() as machines:
        yield machines
        gc.collect()
        assert machines.driver.faults == []
        assert machines.driver.live() == {}
        assert not list(machines.trt.objects)
