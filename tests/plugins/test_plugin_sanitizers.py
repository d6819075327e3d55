"""The kernel on the CPU under the address and undefined-behaviour sanitizers: buffers, workspace, shared arrays."""

import os
import shutil
import subprocess
import sys

import on_cpu
import pytest

FLAGS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
# The program of make gpu-report's phase sanitizer, and a call that keeps nothing.
CASES = """
from pathlib import Path
from benchmarks.gpu_report.sanitizer import main
raise SystemExit(main(Path({!r}), "cpu"))
"""
NOTHING_KEPT = """
from pathlib import Path
import numpy as np
from benchmarks.gpu_report.topk_library import Addresses, KernelLibrary, Sizes
kernel, sizes = KernelLibrary(Path({!r}), "l2"), Sizes(1, 2, 900, 0)
arrays = [np.ones((1, 2, 900), "f4"), np.ones(2, "f4"), np.zeros((1, 900), "i8"), np.zeros((1, 900), "f4")]
arrays += [np.zeros((1, 0), "i4"), np.zeros((1, 900), "f4")]
workspace = np.zeros(kernel.workspace_bytes(sizes), np.uint8)
kernel.enqueue(Addresses(*(array.ctypes.data for array in arrays)), sizes, workspace.ctypes.data, 1)
"""


@pytest.fixture
def under_the_sanitizer(repository, tmp_path):
    """Runs a program over the kernel compiled with the sanitizers from a folder of sources."""

    def run(program, sources=on_cpu.FOLDER):
        library = on_cpu.compile_for_cpu(repository / "build" / "plugins-on-cpu", sources, options=FLAGS)
        runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        # Python's own leaks are not ours, and its memory must come from the checked allocator
        variables = {
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(repository),
        }
        command = [sys.executable, "-c", program.format(str(library))]
        return subprocess.run(
            command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_the_kernel_touches_nothing_that_is_not_its_own(under_the_sanitizer):
    done = under_the_sanitizer(CASES)
    assert done.returncode == 0, done.stderr


def test_keeping_nothing_is_refused_and_would_write_out_of_bounds_otherwise(under_the_sanitizer, tmp_path):
    refused = under_the_sanitizer(NOTHING_KEPT)
    assert "invalid argument" in refused.stderr and "AddressSanitizer:" not in refused.stderr
    folder = tmp_path / "kernel"
    shutil.copytree(on_cpu.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    kernel = folder / "weighted_topk_kernel.cu"
    text = kernel.read_text()
    assert "sizes.num_kept >= 1" in text
    kernel.write_text(text.replace("sizes.num_kept >= 1", "sizes.num_kept >= 0"))
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in under_the_sanitizer(NOTHING_KEPT, folder).stderr
