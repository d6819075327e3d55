"""Evaluation: metrics, intervals, data sets, results that survive a kill, and the command itself."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import generate
from hawk_trt import Pipeline
from hawk_trt.apps.cli.main import main
from hawk_trt.apps.evaluate.summary import (
    Interval,
    Row,
    difference_interval,
    mean_interval,
    pareto_front,
    to_csv,
    unsteady,
)
from killed import kill_twice


def test_a_share_has_wilsons_interval():
    interval = mean_interval([1.0] * 8 + [0.0] * 2)  # the textbook's 8 of 10
    assert (round(interval.low, 4), interval.mean, round(interval.high, 4)) == (0.4902, 0.8, 0.9433)
    assert mean_interval([1.0] * 10).high == 1.0
    assert mean_interval([0.0] * 10).low == 0.0


def test_other_scores_and_differences_have_bootstrap_intervals_of_the_normal_width():
    values = np.random.default_rng(0).random(400)
    half = 1.96 * values.std() / 20
    interval = mean_interval(values.tolist())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert mean_interval([0.3]) == Interval(0.3, 0.3, 0.3)
    # pairs that differ by the same have no spread, however much the scores themselves have
    assert difference_interval(values.tolist(), (values - 0.25).tolist()) == pytest.approx(Interval(*[0.25] * 3))


def row(name, total_ms, accuracy):
    latency_ms = (
        None
        if total_ms is None
        else dict.fromkeys(("preprocess", "vision", "select", "first_layer", "decoder", "decode", "total"), total_ms)
    )
    return Row(name, 0.5, 9, Interval(accuracy, accuracy, accuracy), 64, 32, 2, 1000, latency_ms)


def test_the_pareto_front_holds_what_nothing_beats():
    rows = [row("a", 10, 0.9), row("b", 5, 0.8), row("c", 7, 0.8), row("d", 5, 0.7), row("e", 20, 0.9)]
    assert [r.selector for r in pareto_front([*rows, row("f", None, 1.0)])] == ["a", "b"]
    assert "f,0.5,9,1.0000" in to_csv([row("f", None, 1.0)])


def test_a_stage_that_no_pruning_changes_and_that_differs_is_a_warning():
    assert unsteady([row("a", 10, 0.9), row("b", 11, 0.8), row("c", None, 0.8)]) == []
    preprocess, vision = unsteady([row("a", 10, 0.9), row("b", 14, 0.8)])
    assert preprocess.startswith("preprocess took 10.0 to 14.0 ms, though no pruning changes it.")
    assert vision.startswith("vision took")


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def evaluate(bundle, out, *options):
    argv = ["eval", str(bundle), "--out", str(out), "--count", "6", "--selectors", "hawk,random,norm"]
    return main([*argv, "--keep-ratios", "1,0.1", *map(str, options)])


def test_eval_answers_sums_up_and_draws(tiny_bundle, pipe, tmp_path, capsys):
    assert evaluate(tiny_bundle, tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["dataset"], report["samples"]) == ("tiny", 6)
    rows = {row["selector"]: row for row in report["rows"]}
    assert list(rows) == ["unpruned", "hawk", "random", "norm"]  # keep ratio 1 is one row
    assert "24 of 24 answers" in err
    trials = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert len(trials) == 24
    samples = list(generate(0, 6))
    for name, keep_ratio in (("unpruned", 1.0), ("hawk", 0.1)):
        own = [t for t in trials if t["selector"] == name]
        assert [t["score"] for t in own] == [float(t["answer"] == s.answer) for t, s in zip(own, samples, strict=True)]
        assert rows[name]["accuracy"]["mean"] == pytest.approx(np.mean([t["score"] for t in own]))
        assert {t["keep_ratio"] for t in own} == {keep_ratio}
    assert rows["unpruned"]["accuracy"]["mean"] >= rows["hawk"]["accuracy"]["mean"] > rows["random"]["accuracy"]["mean"]
    text = pipe.processor.layout(pipe.prepare(samples[0].question, images=[samples[0].image])).num_tokens - 64
    (first,) = (t for t in trials if (t["sample"], t["selector"]) == ("0", "hawk"))
    # 4 layers, keys and values of 2 heads of 32 numbers of 4 bytes
    assert first["kv_bytes"] == (7 + text) * pipe.bundle.manifest.kv_bytes_per_token == (7 + text) * 4 * 2 * 2 * 32 * 4
    assert (first["num_visual"], first["num_kept"]) == (64, 7)
    assert first["timings"]["preprocess"] > 0
    with (tmp_path / "summary.csv").open() as file:
        assert [line["selector"] for line in csv.DictReader(file)] == list(rows)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == report["rows"]
    for name in ("accuracy_by_keep_ratio", "accuracy_by_time"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size > (500, 300)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_eval_ends_with_an_error_where_the_disk_is_full(tiny_bundle, tmp_path, capsys):
    argv = ["eval", str(tiny_bundle), "--out", str(tmp_path), "--count", "8"]
    argv += ["--selectors", "hawk", "--keep-ratios", "1,0.2", "--max-new-tokens", "2"]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, unlimited[1]))
    try:
        status = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert f"{tmp_path / 'results.jsonl'}: cannot be written (File too large)" in err
    assert "Traceback" not in err
    known = (tmp_path / "results.jsonl").read_bytes()
    assert known.endswith(b"\n")
    assert main(argv) == 0
    whole = (tmp_path / "results.jsonl").read_bytes()
    assert whole.startswith(known) and len([json.loads(line) for line in whole.splitlines()]) == 17


def test_eval_goes_on_with_its_results_and_refuses_those_of_something_else(tiny_bundle, tmp_path, capsys):
    assert evaluate(tiny_bundle, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "hawk" in shown and "%" in shown and max(map(len, shown.splitlines())) <= 80
    known = (tmp_path / "results.jsonl").read_bytes()
    assert evaluate(tiny_bundle, tmp_path) == 0
    assert "24 answers known, 0 to go" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").read_bytes() == known
    assert evaluate(tiny_bundle, tmp_path, "--count", 7, "--selectors", "hawk", "--keep-mass", 0.5) == 0
    assert "7 answers known, 14 to go" not in capsys.readouterr().err
    grown = (tmp_path / "results.jsonl").read_bytes()
    assert grown.startswith(known) and b'"hawk, mass 0.5"' in grown
    for option, value, name in (
        ("--seed", 1, "dataset"),
        ("--target", "portable", "runtime"),
        ("--quota", "per-image", "quota"),
        ("--metric", "anls", "metric"),
    ):
        assert evaluate(tiny_bundle, tmp_path, option, value) == 1
        assert f"it holds results of another {name}" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").read_bytes() == grown


def test_a_second_eval_does_not_write_among_the_results_of_the_first(tiny_bundle, tmp_path, capsys):
    argv = [sys.executable, "-m", "hawk_trt", "eval", str(tiny_bundle), "--out", str(tmp_path), "--count", "30"]
    results = tmp_path / "results.jsonl"
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not results.exists() or results.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        assert main(argv[3:]) == 1
        os.kill(process.pid, signal.SIGKILL)
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) <= 2  # the second tells a command to try
    assert f"{results}: another run is writing there" in err
    assert main([*argv[3:-1], "1", "--keep-ratios", "0.2"]) == 0  # the lock of a killed run is gone with it


def test_a_killed_eval_goes_on_where_it_was(tiny_bundle, tmp_path):
    results = tmp_path / "results.jsonl"
    argv = ["eval", str(tiny_bundle), "--out", str(tmp_path), "--count", "20"]
    argv += ["--selectors", "hawk,random", "--keep-ratios", "0.2,0.1", "--max-new-tokens", "4"]
    known = kill_twice("hawk_trt.apps.cli.evaluate", results, 5, argv)
    known = known[: known.rfind(b"\n") + 1]
    assert main(argv) == 0
    whole = results.read_bytes()
    assert whole.startswith(known)
    trials = [json.loads(line) for line in whole.splitlines()[1:]]
    assert len(trials) == len({(t["sample"], t["selector"], t["keep_ratio"]) for t in trials}) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "no-such-file.jsonl"], "dataset: got 'no-such-file.jsonl'"),
        (["--count", "0"], "at least 1 sample"),
        (["--keep-ratios", "0"], "keep_ratio: got 0.0"),
        (["--selectors", "fastv"], "--checkpoint"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0"),
        (["--max-pixels", "0"], "--max-pixels: got 0"),
    ],
)
def test_what_eval_cannot_use_is_one_line(tiny_bundle, tmp_path, capsys, options, message):
    assert evaluate(tiny_bundle, tmp_path / "out", *options) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) <= 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_selector_that_does_not_exist_is_wrong_usage(tiny_bundle, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(tiny_bundle, tmp_path, "--selectors", "hawk,luck")
    assert "got 'luck', expected some of hawk, uniform" in capsys.readouterr().err


def test_a_sample_that_cannot_be_read_is_named(tiny_bundle, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text('{"id": "seven", "image": "none.png", "question": "?", "answer": "!"}')
    assert evaluate(tiny_bundle, tmp_path / "out", "--dataset", tmp_path / "some.jsonl") == 1
    assert "sample seven: " in capsys.readouterr().err


def test_keys_that_nothing_reads_are_named(tiny_bundle, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "?", "options": ["left", "right"], "answer": 1, "lable": 3, "source": "x"}')
    assert evaluate(tiny_bundle, tmp_path / "out", "--dataset", path, "--json") == 0
    out, err = capsys.readouterr()
    assert "nothing reads these keys of its samples: lable, source" in err
    assert json.loads(out)["metric"] == "multiple-choice"


def test_without_matplotlib_all_but_the_plots_is_there(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate(tiny_bundle, tmp_path, "--count", 1, "--selectors", "hawk") == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "summary.json", "summary.csv"}


@pytest.mark.parametrize("package", ["rapidfuzz", "scipy"])
def test_without_a_package_of_the_extra_the_error_names_it(package):
    code = f"""
import sys
sys.modules[{package!r}] = None
from hawk_trt.apps.cli.main import main
sys.exit(main(["eval", "any"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = f"error: this command needs {package}: pip install 'hawk-trt[eval]'\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_eval_runs_fastv_in_pytorch_beside_the_others(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    options = ("--selectors", "fastv,hawk", "--checkpoint", tiny_checkpoint, "--count", 3, "--json")
    assert evaluate(tiny_bundle, tmp_path, *options) == 0
    rows = {row["selector"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["fastv"]["latency_ms"] is None
    assert rows["fastv"]["num_kept"] == rows["hawk"]["num_kept"] == 7
    # two of four layers hold every token
    both = (rows["unpruned"]["kv_bytes"] + rows["hawk"]["kv_bytes"]) / 2
    assert rows["fastv"]["kv_bytes"] == pytest.approx(both)
    assert rows["fastv"]["accuracy"]["mean"] == 1.0
