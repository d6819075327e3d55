"""What all tests share: no network, the tiny model and its bundle, and skips that say what is missing."""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

# read when huggingface_hub and PyTorch are imported, so before anything else
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core runs tests; of products this small, threads wait for each other

import pytest
from hypothesis import settings

# each process that a test starts would compile this project anew
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent.parent
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu")  # a card, a Jetson

# The clients that ask the server need Python 3.11.
collect_ignore_glob = [] if sys.version_info >= (3, 11) else ["test_serving*.py", "test_page*.py", "test_ray.py"]

# Neither luck nor the speed of a machine decides whether a test passes.
settings.register_profile("hawk", derandomize=True, deadline=None)
settings.load_profile("hawk")


def pytest_collection_modifyitems(items):
    gpu = any(Path(device).exists() for device in _GPU_DEVICES)
    real = os.environ.get("HAWK_REAL_CHECKPOINT")
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
        if item.get_closest_marker("real") and not real:
            item.add_marker(pytest.mark.skip(reason="HAWK_REAL_CHECKPOINT names no checkpoint folder"))


def pytest_collection_finish():
    """What was imported stays: each of the tests' own gc.collect() would look at its million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _exports_make_no_reference():
    """The command runs what it has exported once more, to write reference.npz; here only the tests of that do."""
    from export import __main__ as command

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_with_reference", lambda bundle: bundle)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The trained tiny Qwen2.5-VL."""
    return ROOT / "examples" / "tiny-vlm"


@pytest.fixture(scope="session")
def sampling_bundle(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny model with a generation_config.json that samples, as many checkpoints have."""
    from export.__main__ import main

    folder = tmp_path_factory.mktemp("sampling")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    file = folder / "checkpoint" / "generation_config.json"
    said = {"do_sample": True, "temperature": 30.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.8}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    assert main([str(folder / "checkpoint"), "--out", str(folder / "bundle"), "--target", "cpu"]) == 0
    return folder / "bundle"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory) -> Path:
    """Its float32 bundle with every target, exported once for all tests: read it, never write to it."""
    from export.__main__ import main

    folder = tmp_path_factory.mktemp("bundles") / "tiny-vlm"
    assert main([str(tiny_checkpoint), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def float_activations(monkeypatch):
    """ONNX Runtime without its own rounding of activations to 8 bits."""

    import onnxruntime as ort

    from hawk_trt.runtime import session as ort_session

    class Options(ort.SessionOptions):
        def __init__(self):
            super().__init__()
            self.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")

    monkeypatch.setattr(ort_session.ort, "SessionOptions", Options)
