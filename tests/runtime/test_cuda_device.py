"""The layer over the CUDA driver: statuses, contexts, capture; on a stand-in, and on a GPU where there is one."""

import gc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu_report.driver import CHECKS
from cuda_standin import CUresult
from hawk_trt.errors import BackendError
from trt_machine import Machines


@pytest.fixture
def machines():
    with Machines() as machines:
        yield machines
        gc.collect()
        assert machines.driver.live() == {}


@pytest.fixture
def standin(machines):
    """A device of the stand-in."""
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    with closing(CudaDevice(0)) as device, device.active():
        device.driver = machines.driver
        yield device


@pytest.fixture
def gpu():
    """A device of this machine."""
    pytest.importorskip("cuda.bindings")
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    with closing(CudaDevice(0)) as device, device.active():
        yield device


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_standin(check, standin):
    check(standin)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check, gpu):
    check(gpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_gives_all_its_memory_back():
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice, call

    size = 256 << 20
    free = call("cuMemGetInfo")[0]
    with closing(CudaDevice(0)) as other:
        with other.active():
            address = other.allocate(size)
            other.zero(address, size)
            other.synchronize()
        assert call("cuMemGetInfo")[0] <= free - size
    assert call("cuMemGetInfo")[0] >= free - (1 << 20)


@pytest.mark.gpu
def test_a_gpu_that_is_full_says_how_much_is_free(gpu):
    with pytest.raises(BackendError, match=r"GPU memory: got [\d.]+ GiB free of [\d.]+, expected 65536.00"):
        gpu.allocate(1 << 46)


@pytest.mark.gpu
def test_pytorch_sees_the_memory_since_both_use_the_primary_context(gpu):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    tensor = torch.arange(64, device="cuda:0", dtype=torch.int64)
    torch.cuda.synchronize()
    target = gpu.allocate_pinned(512)
    gpu.copy_out(target, tensor.data_ptr())
    gpu.synchronize()
    assert target.view(np.int64).tolist() == list(range(64))


def test_a_status_becomes_an_error_with_the_drivers_name_and_words(standin):
    standin.driver.fail = {"cuMemcpyHtoDAsync": [0, CUresult.CUDA_ERROR_INVALID_VALUE]}
    with pytest.raises(
        BackendError, match=r"^cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE \(cuda_error_invalid_value\)$"
    ):
        standin.copy_in(0, np.zeros(4, np.uint8))
    standin.driver.fail = {}


def test_the_thread_gets_back_the_context_that_it_had(machines):
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    with closing(CudaDevice(0)) as device:
        machines.driver.current.append("another's")
        with device.active():
            assert machines.driver.current[-1] == ("context", 0)
        assert machines.driver.current == ["another's"]
    assert machines.driver.current == ["another's"]


def test_a_device_that_cannot_be_opened_leaves_nothing(machines):
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    machines.driver.fail = {"cuStreamCreate": [0, CUresult.CUDA_ERROR_OUT_OF_MEMORY]}
    with pytest.raises(BackendError, match="cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaDevice(0)
    assert machines.driver.live() == {}


def test_a_release_that_fails_is_told_and_the_others_go_on(machines):
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    device = CudaDevice(0)
    with device.active():
        device.allocate(16)
        device.event()
    machines.driver.fail = {"cuEventDestroy": [0, CUresult.CUDA_ERROR_INVALID_HANDLE]}
    with pytest.raises(BackendError, match="cuEventDestroy"):
        device.close()
    machines.driver.fail = {}
    assert machines.driver.live() == {"event": 1}
    machines.driver.handles.clear()


def test_without_a_driver_the_error_says_so(machines, monkeypatch):
    from cuda_standin import Driver
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    def missing(*_):
        raise RuntimeError("libcuda.so.1: not found")

    monkeypatch.setattr(Driver, "cuInit", missing)
    with pytest.raises(BackendError, match=r"no NVIDIA driver was found \(libcuda.* hawk-trt doctor"):
        CudaDevice(0)
    assert machines.driver.live() == {}


@pytest.mark.skipif(any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvhost-gpu")), reason="has a GPU")
def test_the_real_bindings_without_a_gpu_are_refused_and_do_not_crash():
    pytest.importorskip("cuda.bindings")
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    with pytest.raises(BackendError, match=r"GPU: no NVIDIA driver|cuInit: CUDA_ERROR|0 GPUs"):
        CudaDevice(0)
