"""hawk-trt bench: what it measures, on the tiny model. No time is judged here."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import golden
from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.bench.bench import STAGES, BenchPrompt, BenchRow, Spread, bench, plot_rows, unsteady
from hawk_trt.apps.cli.main import main
from hawk_trt.errors import InvalidInput

OPTIONS = ["--sides", "112,224", "--keep-ratios", "1,0.25", "--repeats", "2", "--warmup", "0", "--max-new-tokens", "3"]


def test_the_command_measures_every_pair_and_draws_it(tiny_bundle, tmp_path, capsys):
    picture = tmp_path / "bench.png"
    assert main(["bench", str(tiny_bundle), *OPTIONS, "--plot", str(picture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["prompt"], row["keep_ratio"]): row for row in report["rows"]}
    assert [row["num_visual"] for row in report["rows"]] == [16, 16, 64, 64]
    assert [row["num_kept"] for row in report["rows"]] == [16, 4, 64, 16]
    for row in rows.values():
        assert set(row["stages"]) == set(STAGES)
        for stage in row["stages"].values():
            assert stage["low"] <= stage["median"] <= stage["high"] <= stage["p90"] <= stage["p99"]
        prefill = sum(row["stages"][name]["low"] for name in ("preprocess", "vision", "first_layer", "decoder"))
        assert prefill <= row["first_token"]["high"] < row["total"]["high"]
        assert row["peak_bytes"] > 10_000_000
    # one column of keys and values a token: 4 layers x 2 x 2 heads x 32 x 4 bytes
    whole, pruned = rows["224 x 224 px", 1.0], rows["224 x 224 px", 0.25]
    assert whole["kv_bytes"] - pruned["kv_bytes"] == 48 * 4 * 2 * 2 * 32 * 4
    with Image.open(picture) as drawn:
        assert drawn.width > 500


def test_the_table_sets_every_ratio_against_unpruned(tiny_bundle, capsys):
    assert main(["bench", str(tiny_bundle), *OPTIONS, "--selector", "uniform"]) == 0
    out = capsys.readouterr().out
    unpruned = [line for line in out.splitlines() if "unpruned" in line]
    assert [line.count("(1.00x)") for line in unpruned] == [2, 2]  # a pruned row may happen to take as long
    assert out.count("uniform") == 2
    assert "VmHWM" in out


def row_of(vision_ms, spread_ms, **more):
    def around(median):
        return Spread(median, median - spread_ms, median + spread_ms, *[median + spread_ms] * 3)

    stages = dict.fromkeys(STAGES, around(5.0)) | {"vision": around(vision_ms)}
    row = BenchRow("a", "hawk", 0.2, 20, 16, 4, stages, around(20.0), around(30.0), 1, None)
    return replace(row, **more)


def test_a_stage_that_no_pruning_changes_and_that_differs_is_a_warning():
    assert unsteady([row_of(10, 1), row_of(11, 1), row_of(40, 1, prompt="b")]) == []
    assert unsteady([row_of(10, 5), row_of(18, 5)]) == [], "the quartiles overlap"
    (warning,) = unsteady([row_of(10, 1), row_of(18, 1, keep_ratio=1.0)])
    assert warning.startswith("a: vision took 10.0 to 18.0 ms, though no pruning changes it.")


def test_a_bundle_without_a_tokenizer_is_measured_on_tensors(tmp_path, capsys):
    options = ["--im-end-token-id", str(golden.IM_END)]
    assert export([str(golden.MODEL), "--out", str(tmp_path / "b"), *options]) == 0
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "b"), *OPTIONS, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["num_tokens"] for row in rows] == [16 + 34] * 2 + [64 + 34] * 2


@pytest.mark.parametrize(
    ("options", "code"), [(["--sides", "x"], 2), (["--sides", "3"], 1), (["--max-new-tokens", "1"], 1)]
)
def test_what_cannot_be_measured_is_refused(tiny_bundle, options, code, capsys):
    try:
        got = main(["bench", str(tiny_bundle), *options])
    except SystemExit as error:
        got = error.code
    assert got == code
    assert "expected" in capsys.readouterr().err


def test_runs_are_interleaved(tiny_bundle):
    order = []
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        inputs = pipe.prepare("What is red?")

        def prepare(name):
            order.append(name)
            return inputs

        prompts = [BenchPrompt(name, lambda name=name: prepare(name)) for name in ("a", "b")]
        rows = bench(
            pipe, prompts, [PruningConfig(keep_ratio=1.0)], max_new_tokens=2, repeats=2, warmup=1, step=lambda: None
        )
        with pytest.raises(InvalidInput, match="expected at least 2, 1, 0"):
            bench(
                pipe, prompts, [PruningConfig(keep_ratio=1.0)], max_new_tokens=2, repeats=0, warmup=0, step=lambda: None
            )
    assert order == ["a", "b"] * 3
    assert plot_rows(rows, "a model").startswith(b"\x89PNG")
