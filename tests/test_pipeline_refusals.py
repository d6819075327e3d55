"""What the pipeline cannot do is refused before anything runs, in words that say what helps."""

import dataclasses

import numpy as np
import pytest

from examples.tiny_task import generate
from export.__main__ import main as export
from hawk_trt import HawkError, ModelInputs, Pipeline, PruningConfig, Request, SamplingConfig
from hawk_trt.errors import BackendError, BundleError, InvalidInput

SAMPLES = list(generate(11, 10))
PRUNING = PruningConfig(keep_ratio=0.2)


@pytest.fixture(scope="module")
def inplace(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        assert pipe.backend.target == "cpu"
        yield pipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"pruning": PruningConfig(head_weights=(1.0, 2.0))}, "got 2 values, expected 8"),
        ({"images": [SAMPLES[0].image], "min_pixels": 10_000, "max_pixels": 100}, "expected 0 < min_pixels"),
        ({"images": [b"not an image"]}, "image"),
        ({"images": [np.zeros((0, 4, 3), np.uint8)]}, "image"),
        ({"prompt": ModelInputs(input_ids=[1, 2]), "images": [SAMPLES[0].image]}, "beside ModelInputs"),
        ({"prompt": ModelInputs(input_ids=[1, 9999])}, "input_ids: got ids from 1 to 9999"),
        ({"prompt": ModelInputs(input_ids=[-1, 1])}, "input_ids: got ids from -1"),
        ({"prompt": []}, "messages"),
        ({"prompt": 3}, "prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(inplace, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        inplace.generate(**{"prompt": "What is red?", "images": []} | arguments)


def test_pixels_that_do_not_fit_their_grid_are_refused(inplace):
    good = inplace.prepare("What is red?", [SAMPLES[0].image])
    with pytest.raises(InvalidInput, match="pixel_values"):
        inplace.generate(dataclasses.replace(good, pixel_values=good.pixel_values[:-4]))
    with pytest.raises(InvalidInput, match="pixel_values"):
        inplace.generate(dataclasses.replace(good, pixel_values=None))


def test_a_bad_request_of_a_batch_is_named(inplace):
    with pytest.raises(InvalidInput, match=r"requests\[1\]: .*image"):
        inplace.generate_batch(["What is red?", Request("What is red?", [b"broken"])])


@pytest.mark.parametrize(
    "values",
    [
        {"keep_ratio": 0}, {"keep_ratio": -1}, {"keep_ratio": 2}, {"keep_ratio": float("nan")}, {"keep_ratio": "0.2"},
        {"head_weights": (float("nan"), 1.0)}, {"head_weights": (0.0, 0.0)}, {"head_weights": ()},
        {"head_weights": (-1.0, 2.0)},
        {"selector": "best"}, {"query": "all"}, {"query": ""}, {"quota": "none"},
        {"quota": np.array(["global", "turn"])}, {"selector": np.array(["hawk", "norm"])},
        {"head_weights": (-weight for weight in (1.0, 2.0))}, {"min_visual_tokens": 0}, {"min_visual_tokens": 1.5},
    ],
)  # fmt: skip
def test_invalid_pruning_raises_at_construction(values):
    with pytest.raises(HawkError, match=next(iter(values))):
        PruningConfig(**values)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -3}],
)
def test_invalid_sampling_raises_at_construction(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingConfig(**values)


def test_a_missing_target_names_the_export_option(tiny_checkpoint, tmp_path):
    assert export([str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--target", "portable"]) == 0
    assert Pipeline.load(tmp_path / "b", threads=1).backend.target == "portable"
    with pytest.raises(BundleError, match="--target cpu"):
        Pipeline.load(tmp_path / "b", target="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, 'expected "cpu", "cuda"'),
        ({"device": 0}, 'device: got 0, expected "cpu", "cuda"'),
    ],
)
def test_an_unknown_device_is_refused(tiny_bundle, arguments, message):
    with pytest.raises(HawkError, match=message):
        Pipeline.load(tiny_bundle, **arguments)


def test_bfloat16_says_on_the_cpu_what_to_do(tiny_checkpoint, tmp_path):
    assert export([str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    with pytest.raises(BackendError, match=r"--dtype float32 or float16"):
        Pipeline.load(tmp_path / "b")


class Unreadable:
    """A tensor of another library whose dtype numpy lacks."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("x", pruning=0.2), "pruning: got 0.2, expected a PruningConfig"),
        (lambda: Request("x", sampling={"temperature": 1}), "sampling: got .*, expected a SamplingConfig"),
        (lambda: Request("x", stop=None), "stop: got None, expected a list"),
        (lambda: Request("x", skip_special_tokens=None), "skip_special_tokens: got None, expected a bool"),
        (lambda: Request("x", ignore_eos="no"), "ignore_eos: got 'no', expected a bool"),
        (lambda: PruningConfig(head_weights={1: 0.5, 2: 0.7}), "head_weights: got {1: 0.5, 2: 0.7}, expected a seq"),
        (lambda: Request("x", min_pixels="784"), "min_pixels: got '784', expected an integer"),
        (lambda: ModelInputs(input_ids=[[1], [2, 3]]), "input_ids: got list without numbers"),
        (lambda: ModelInputs([1], image_grid_thw="x"), "image_grid_thw: got str without numbers"),
        (lambda: ModelInputs([1], pixel_values=Unreadable()), "pixel_values: got Unreadable .*BFloat16"),
        (lambda: SamplingConfig(logit_bias=5), "logit_bias: got 5, expected a mapping"),
        (lambda: SamplingConfig(logit_bias=[1, 2]), "logit_bias: got .1, 2., expected a mapping"),
    ],
)
def test_a_value_of_another_type_is_refused_where_it_is_given(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_what_no_model_or_this_one_cannot_do_is_refused(tiny_bundle):
    image = np.zeros((56, 56, 3), np.uint8)
    asked = [
        ({"sampling": SamplingConfig(logit_bias={464: 1.0})}, "logit_bias: got token 464, expected one below 464"),
        ({"images": image, "min_pixels": 10**15, "max_pixels": 10**15}, "min_pixels: got 10+, expected at most"),
    ]
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        for options, message in asked:
            with pytest.raises(InvalidInput, match=message):
                pipe.generate("hi", **options)
        begun, failed = (
            pipe.stream("hi"),
            pipe.stream("hi", images=image, pruning=PruningConfig(selector=lambda *_: [])),
        )
        for read in (next, lambda stream: stream.result):
            with pytest.raises(InvalidInput, match="selector: got"):
                read(failed)
    for late in (pipe.generate, lambda _: next(begun), lambda _: begun.result):
        with pytest.raises(BackendError, match="it is closed"):
            late("hi")
    with pytest.raises(BundleError, match="aaa: cannot be read"):
        Pipeline.load("a" * 5000)


def test_a_result_is_found_in_a_list_though_arrays_have_no_one_truth(inplace):
    results = inplace.generate_batch(["hi", "ho"], max_new_tokens=1)
    assert results.index(results[1]) == 1 and results[0] != results[1]
    assert ModelInputs([1, 2]) != ModelInputs([1, 2])


def test_weights_of_heads_may_come_one_by_one():
    assert PruningConfig(head_weights=(weight for weight in (1, 2))).head_weights == (1.0, 2.0)


def test_what_is_no_list_of_prompts_or_no_path_is_called_so(tiny_bundle):
    with pytest.raises(InvalidInput, match="path: got NoneType, expected the folder of a bundle"):
        Pipeline.load(None)
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        for wrong in ("hi", b"hi", None, Request("hi"), {"prompt": "hi"}):
            with pytest.raises(InvalidInput, match=r"requests: got .*, expected a list of prompts"):
                pipe.generate_batch(wrong)


def test_a_checkpoint_in_the_place_of_a_bundle_is_to_be_exported(tiny_checkpoint):
    with pytest.raises(
        BundleError, match=f"Make one: hawk-trt export {tiny_checkpoint} --out {tiny_checkpoint}-bundle"
    ):
        Pipeline.load(tiny_checkpoint)
