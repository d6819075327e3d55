"""Which ONNX Runtime may drive a GPU."""

import onnxruntime as ort
import pytest

from hawk_trt.errors import BackendError
from hawk_trt.runtime.session import Device


def test_a_runtime_that_copies_nothing_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "__version__", "1.25.1")
    with pytest.raises(BackendError, match=r"got 1\.25\.1.*expected 1\.26 or newer\. pip install"):
        Device("cuda")


@pytest.mark.parametrize("capture", [False, True])
def test_sessions_on_a_gpu_never_plan_with_cudnn_and_never_round_to_tf32(
    monkeypatch: pytest.MonkeyPatch, capture: bool
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    (name, options), _ = Device("cuda").providers(capture=capture)
    assert (name, options["use_tf32"], "enable_cuda_graph" in options) == ("CUDAExecutionProvider", "0", capture)
    cudnn = 8
    assert int(options["sdpa_kernel"]) > 0
    assert not int(options["sdpa_kernel"]) & cudnn
