"""advise: a model of the stages' times, what it predicts and recommends, and the command. Nothing here is timed."""

import json

import numpy as np
import pytest

from checkpoints import make_checkpoint
from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.bench.advice import MEASURED_RATIOS, Size, StageTimes, TimeModel, measure, prompt_size
from hawk_trt.apps.cli.main import main
from hawk_trt.request import Result, Timings
from hybrid import HYBRID

SIZE = Size(num_text=40, num_visual=1000, allocated=False)


def times(image, first_layer, decoder, step, size=SIZE, begin=0.0, new_tokens=18):
    """What a machine would take whose stages cost a + b K + c K C, and a step a + b C."""

    def at(ratio):
        kept = size.kept(ratio)
        terms = np.array([1, kept, kept * size.prefill_columns(ratio, new_tokens)])
        decode = np.array([1, size.step_columns(ratio, new_tokens)]) @ step
        return StageTimes(ratio, new_tokens, image, terms @ first_layer, terms @ decoder, 0.0, begin, decode)

    return [at(ratio) for ratio in MEASURED_RATIOS]


MACHINE = {
    "image": 0.02,
    "first_layer": np.array([1e-3, 5e-6, 0.0]),
    "decoder": np.array([2e-3, 1e-4, 2e-8]),
    "step": np.array([4e-3, 1e-6]),
}


@pytest.mark.parametrize("allocated", [False, True])
def test_the_model_finds_the_costs_of_a_machine_and_predicts_what_it_never_saw(allocated):
    size = Size(40, 1000, allocated)
    model = TimeModel(size, times(**MACHINE, size=size, begin=0.003))
    for ratio, length in ((0.7, 1), (0.2, 32), (0.1, 500)):
        kept = 40 + round(1000 * ratio)
        columns = kept + (length - 1 if allocated else 0)
        terms = np.array([1, kept, kept * columns])
        first = 0.02 + terms @ (MACHINE["first_layer"] + MACHINE["decoder"])
        context = kept + (length - 1 if allocated else length / 2)
        decoding = 0.003 + (length - 1) * (4e-3 + 1e-6 * context) if length > 1 else 0.0
        predicted = model.predict(ratio, length)
        assert predicted.num_kept == kept - 40
        assert predicted.first_token == pytest.approx(first, rel=1e-6)
        assert predicted.total == pytest.approx(first + decoding, rel=1e-6)


def test_noise_never_makes_a_stage_faster_with_more_tokens():
    noisy = [
        StageTimes(ratio, 18, 0.01, first, decoder, 0.0, 0.0, step)
        for ratio, first, decoder, step in ((1.0, 0.9, 1.0, 0.1), (0.4, 1.1, 0.9, 0.2), (0.05, 1.0, 1.1, 0.3))
    ]
    model = TimeModel(SIZE, noisy)
    predicted = [model.predict(ratio, 64).total for ratio in (0.01, 0.2, 0.5, 1.0)]
    assert predicted == sorted(predicted)
    assert min(predicted) > 0


def test_the_mildest_ratio_that_saves_most_is_recommended():
    model = TimeModel(SIZE, times(**MACHINE))
    chosen = model.recommend((0.8, 0.4, 0.2, 0.1), 1)
    savings = {ratio: 1 - model.predict(ratio, 1).total / model.predict(1.0, 1).total for ratio in (0.8, 0.4, 0.2, 0.1)}
    best = max(savings.values())
    assert chosen.keep_ratio == max(ratio for ratio, saving in savings.items() if saving >= 0.8 * best) == 0.2
    assert chosen.saving == pytest.approx(savings[0.2])
    assert "0.1 no more than" in chosen.reason


@pytest.mark.parametrize(
    ("machine", "size", "new_tokens", "reason"),
    [
        (MACHINE | {"image": 5.0}, SIZE, 32, "vision-bound: 9"),
        (MACHINE | {"step": np.array([4e-3, 1e-7])}, SIZE, 5000, "bound by decoding: 9"),
        (MACHINE, Size(40, 9, False), 1, "short prompt: it has 49 tokens, 9 of them visual"),
        (MACHINE, Size(40, 0, False), 32, "no visual tokens"),
    ],
)
def test_where_pruning_gains_little_it_is_not_recommended_and_the_reason_is_said(machine, size, new_tokens, reason):
    if reason.startswith("short"):
        machine = machine | {"image": 1e-3}
    advice = TimeModel(size, times(**machine, size=size)).recommend((0.4, 0.1), new_tokens)
    assert advice.keep_ratio is None
    assert reason in advice.reason


def test_a_hybrid_model_is_told_what_its_layers_over_all_tokens_take():
    machine = MACHINE | {"first_layer": np.array([0.03, 5e-6, 0.0])}  # 0.03 s whatever is kept
    model = TimeModel(SIZE, times(**machine))
    shares = {ratio: model.whole_share(HYBRID, ratio) for ratio in (1.0, 0.1)}
    for ratio, share in shares.items():
        kept = 40 + 1000 * ratio
        terms = np.array([1, kept, kept * kept])
        assert share.measured == pytest.approx(0.03 / (terms @ (machine["first_layer"] + machine["decoder"])), rel=1e-5)
        assert share.layers == 2
    # layers 0 and 1 of 5: less than 2/5 unpruned, since attention grows with the tokens, and more when pruned
    assert 0.1 < shares[1.0].by_products < 0.4 < shares[0.1].by_products < 1
    mlp = 3 * 64 * 96
    linear = mlp + 64 * (56 + 2 * 24 + 2 * 4) + 56 * 4 + 4 * 4 * 6 * 8
    full = mlp + 64 * (2 * 64 + 2 * 32)
    rest = 1040 * linear + 2 * 1040 * (full + 64 * 1040)
    assert shares[1.0].by_products == pytest.approx(2 * 1040 * linear / (2 * 1040 * linear + rest))


def test_the_measurement_takes_the_pipelines_own_timings_apart():
    asked = []

    def ask(pruning, new_tokens):
        asked.append((pruning.keep_ratio, new_tokens))
        decode = 0.5 + 0.1 * (new_tokens - 1)
        timings = Timings(preprocess=0.1, vision=0.2, first_layer=0.3, decoder=0.4, decode=decode, total=1.02 + decode)
        return Result("", [], "length", 4, 4, np.arange(9), np.zeros(4, np.float32), timings)

    for measured in measure(ask, 0.0, (1.0, 0.1)):
        assert (measured.image, measured.first_layer, measured.decoder) == (pytest.approx(0.3), 0.3, 0.4)
        assert (measured.rest, measured.begin) == (pytest.approx(0.02), pytest.approx(0.5))
        assert measured.step == pytest.approx(0.1)
    assert {ratio for ratio, _ in asked} == {1.0, 0.1}


def test_the_cache_grows_as_the_profile_says(tiny_bundle):
    image = np.zeros((112, 112, 3), np.uint8)
    for target, allocated in (("cpu", True), ("portable", True)):
        with Pipeline.load(tiny_bundle, target=target, threads=1) as pipe:
            result = pipe.generate("What?", [image], pruning=PruningConfig(keep_ratio=1.0), max_new_tokens=1)
            size = prompt_size(pipe, result)
        assert (size.num_visual, size.allocated) == (16, allocated)
        assert size.num_text + 16 == len(result.kept_indices)


def test_the_command_predicts_and_recommends(tiny_bundle, capsys):
    argv = ["advise", str(tiny_bundle), "--image-size", "112", "--seconds", "0", "--max-new-tokens", "1,8"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "16 visual tokens" in err
    assert "8 tokens" in out
    assert all(f"\n{token}" in out for token in ("1 token: ", "8 tokens: "))
    assert main([*argv, "--keep-ratios", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(p["keep_ratio"], p["new_tokens"]) for p in told["predictions"]] == [(1, 1), (1, 8), (0.5, 1), (0.5, 8)]
    assert all(0 < p["first_token"] <= p["total"] for p in told["predictions"])
    assert [r["new_tokens"] for r in told["recommendations"]] == [1, 8]
    assert told["size"]["num_visual"] == 16


def test_a_bundle_without_a_tokenizer_is_measured_too(tmp_path, capsys):
    assert export([str(make_checkpoint(tmp_path / "model")), "--out", str(tmp_path / "bundle")]) == 0
    argv = ["advise", str(tmp_path / "bundle"), "--image-size", "112", "--seconds", "0", "--max-new-tokens", "4"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"]["num_visual"] == 16
    assert main([*argv, "--image", "a.png"]) == 1
    assert "--image: this bundle has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratios", "0"], "keep_ratio: got 0.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--max-new-tokens", "1.5"], "--max-new-tokens"),
        (["--image-size", "0"], "--image-size: got 0"),
        (["--image", "no-such.png"], "no-such.png"),
    ],
)
def test_what_cannot_be_used_is_one_line(tiny_bundle, capsys, options, message):
    assert main(["advise", str(tiny_bundle), *options]) == 1
    assert message in capsys.readouterr().err
