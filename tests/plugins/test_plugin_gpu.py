"""The plugin's kernel on a GPU: what the report's phase finds there."""

import json

import pytest

from benchmarks.gpu_report.__main__ import main


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_gives_the_oracles_answers_eagerly_and_from_a_graph(tmp_path):
    out = tmp_path / "report.json"
    assert main(["--phases", "kernel", "--work", str(tmp_path), "--out", str(out)]) == 0
    results = json.loads(out.read_text())["phases"]["kernel"]["results"]
    assert results["cases"] > 300
    assert not results["failures"]
