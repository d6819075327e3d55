"""The plugin's kernel on a GPU: what gpu_check finds there."""

import json
import subprocess
import sys

import pytest


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_gives_the_oracles_answers_eagerly_and_from_a_graph(repository, tmp_path):
    options = ["-DHAWK_PLUGIN=OFF", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    subprocess.run(["cmake", "-S", repository / "plugins", "-B", tmp_path, *options], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    command = [sys.executable, "-m", "plugins.gpu_check", "--build", tmp_path, "--kernel-only", "--no-timing", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["cases"] > 300
    assert not report["failures"]
