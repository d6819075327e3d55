"""compute-sanitizer over the kernel: memory (memcheck) and races in shared memory (racecheck), on a few cases.

The checked program is this file: numpy, ctypes and cuda-bindings, since PyTorch takes minutes under the sanitizer.
"""

import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.gpu_report.record import ROOT, Record, Setting, Skipped
from benchmarks.gpu_report.topk_cases import disagreement, random_case
from benchmarks.gpu_report.topk_library import Addresses, KernelLibrary, Sizes
from hawk_trt.errors import BackendError
from hawk_trt.stages import NORMALIZATIONS

_TOOLS = ("memcheck", "racecheck")
# A row in one block, one in several, and a batch of rows whose lengths fill no block.
_SIZES = (Sizes(1, 3, 300, 61), Sizes(1, 28, 1300, 260), Sizes(3, 5, 5001, 999))
_FOUND = 9
_REFUSED = ("Device not supported", "error 999", "Unable to find injection")


def sanitizer(record: Record, setting: Setting) -> None:
    """Run the program alone, then under each tool."""
    from benchmarks.gpu_report.kernel import libraries  # imports PyTorch, which the program must not

    library = libraries("l2", setting, record)["kernel"]
    assert isinstance(library, KernelLibrary)
    program = [sys.executable, "-m", "benchmarks.gpu_report.sanitizer", str(library.path), setting.torch_device]
    _run("the program alone", program)
    record.put(cases=len(_SIZES) * len(NORMALIZATIONS), alone="right")
    if setting.rehearse:
        raise Skipped("compute-sanitizer needs a GPU; the program that it would check ran")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise Skipped("compute-sanitizer: not found; it comes with the CUDA toolkit")
    for name in _TOOLS:
        _run(name, [tool, "--tool", name, "--error-exitcode", str(_FOUND), *program])
        record.put(**{name: "clean"})


def _run(what: str, command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    refusal = next((word for word in _REFUSED if word in said), None)
    if refusal is not None:
        raise Skipped(f"{what}: compute-sanitizer refuses this machine ({refusal})")
    if done.returncode != 0:
        raise BackendError(f"{what}: status {done.returncode}: {said[-600:]}")


def main(path: Path, device: str) -> int:
    """Run every case once on a device; 1 where an answer is wrong."""
    for normalization in NORMALIZATIONS:
        library = KernelLibrary(path, normalization)
        for seed, sizes in enumerate(_SIZES):
            case = random_case(seed, sizes, ties=True, broken=True)
            kept = np.full((sizes.batch, sizes.num_kept), -1, np.int32)
            scores = np.full((sizes.batch, sizes.seq_len), np.nan, np.float32)
            arrays = [case.head_scores, case.head_weights, case.visual_rows, case.select_bias, kept, scores]
            (_run_on_gpu if device == "cuda" else _run_on_cpu)(library, sizes, arrays)
            wrong = disagreement(case, normalization, kept, scores)
            if wrong is not None:
                print(f"{normalization} {sizes}: {wrong}", file=sys.stderr)
                return 1
    return 0


def _run_on_cpu(library: KernelLibrary, sizes: Sizes, arrays: list[np.ndarray]) -> None:
    workspace = np.full(library.workspace_bytes(sizes), 255, np.uint8)
    library.enqueue(Addresses(*(array.ctypes.data for array in arrays)), sizes, workspace.ctypes.data, 1)


def _run_on_gpu(library: KernelLibrary, sizes: Sizes, arrays: list[np.ndarray]) -> None:
    from hawk_trt.runtime.tensorrt.cuda import CudaDevice

    with closing(CudaDevice(0)) as device, device.active():
        places = [device.allocate(array.nbytes) for array in arrays]
        for place, array in zip(places, arrays, strict=True):
            device.upload(place, array)
        library.enqueue(Addresses(*places), sizes, device.allocate(library.workspace_bytes(sizes)), device.stream)
        for place, array in list(zip(places, arrays, strict=True))[-2:]:
            array[...] = device.download(place, array.shape, array.dtype)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
