"""The TensorRT backend gives what ONNX Runtime gives: the whole chain on stand-ins with real buffers."""

import json

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Request, SamplingConfig
from hawk_trt.errors import BackendError
from hawk_trt.runtime.trace import traced
from hawk_trt.stages import CPU, PORTABLE, TENSORRT
from trt_machine import Machines, engine_folder

SAMPLES = list(generate(11, 6))
PRUNINGS = {
    "keep 0.2": PruningConfig(keep_ratio=0.2),
    "keep all": PruningConfig(keep_ratio=1.0),
    "per image": PruningConfig(keep_ratio=0.5, quota="per-image"),
}
REQUESTS = {
    "one image": Request(SAMPLES[0].question, [SAMPLES[0].image]),
    "two images of other sizes": Request(SAMPLES[1].question, [SAMPLES[1].image, SAMPLES[2].image[:112, :140]]),
    "no image": Request("Hello?"),
    "a video": Request("What is red?", videos=[np.stack([s.image for s in SAMPLES[:3]])]),
}


@pytest.fixture(scope="module", params=(TENSORRT, PORTABLE))
def pipes(request, tiny_bundle, tmp_path_factory):
    """The engines in TensorRT, and their bundle in ONNX Runtime."""
    out = engine_folder(tiny_bundle, tmp_path_factory.mktemp("engines") / "tiny", request.param)
    with (
        Machines() as machines,
        Pipeline.load(out) as plans,
        Pipeline.load(tiny_bundle, target=CPU if request.param == TENSORRT else PORTABLE, threads=1) as bundle,
    ):
        yield plans, bundle
        assert machines.driver.faults == []


def same(got, expected):
    assert (got.text, got.token_ids, got.finish_reason) == (expected.text, expected.token_ids, expected.finish_reason)
    assert (got.num_visual, got.num_kept) == (expected.num_visual, expected.num_kept)
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)
    if expected.logits is not None:
        np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_answers_kept_tokens_scores_and_logits_are_those_of_onnx_runtime(pipes, request_, pruning):
    options = {"pruning": pruning, "max_new_tokens": 6, "ignore_eos": True, "return_logits": True}
    got, expected = (pipe.generate(request_.prompt, request_.images, request_.videos, **options) for pipe in pipes)
    same(got, expected)


def test_without_logits_the_token_that_the_graph_chose_is_the_answer(pipes):
    for sample in SAMPLES[:3]:
        same(*(pipe.generate(sample.question, [sample.image], max_new_tokens=6) for pipe in pipes))


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_batches_of_unlike_prompts_are_those_of_onnx_runtime(pipes, pruning):
    for rows in (4, 2, 3):  # the decode step is bound anew for each
        batch = list(REQUESTS.values())[-rows:]
        options = {"pruning": pruning, "max_new_tokens": 5, "ignore_eos": True, "return_logits": True}
        for got, expected in zip(*(pipe.generate_batch(batch, **options) for pipe in pipes), strict=True):
            same(got, expected)


def test_sampled_answers_are_those_of_onnx_runtime(pipes):
    sampling = SamplingConfig(temperature=30.0, top_p=0.95, seed=5)
    sample = SAMPLES[3]
    options = {"max_new_tokens": 8, "sampling": sampling, "ignore_eos": True}
    same(*(pipe.generate(sample.question, [sample.image], **options) for pipe in pipes))


def test_every_stage_leaves_what_onnx_runtime_leaves(pipes):
    sample = SAMPLES[4]
    inputs = pipes[1].prepare(sample.question, [sample.image])
    got, expected = (traced(pipe, inputs, PRUNINGS["keep 0.2"], [5, 9, 11]) for pipe in pipes)
    for name in ("visual_embeds", "scores", "kept_indices", "hidden_states", "logits"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-4, err_msg=name)


def test_an_image_alone_and_its_tensors_without_a_mask_answer_alike(pipes):
    sample = SAMPLES[5]
    inputs = pipes[1].prepare(sample.question, [sample.image])
    bare = ModelInputs(inputs.input_ids, None, inputs.pixel_values, inputs.image_grid_thw)
    same(*(pipe.generate(bare, max_new_tokens=4) for pipe in pipes))


def test_timings_add_up_to_no_more_than_the_whole(pipes):
    timings = pipes[0].generate(SAMPLES[0].question, [SAMPLES[0].image], max_new_tokens=4).timings
    parts = (timings.preprocess, timings.vision, timings.first_layer, timings.decoder, timings.decode)
    assert min(parts) > 0
    assert sum(parts) <= timings.total + 1e-3


def test_where_no_slot_is_free_the_next_generation_ends_the_one_unused_for_longest_and_says_so(pipes):
    plans, bundle = pipes
    places = plans.backend.max_batch

    def begin(pipe, number):
        stream = pipe.stream(SAMPLES[number].question, [SAMPLES[number].image], max_new_tokens=6, ignore_eos=True)
        stream._scheduler.step()
        return stream

    streams = [begin(plans, number) for number in range(places)]
    if places > 1:
        streams[0]._scheduler.step()  # so that the second is the one
    same(*(pipe.generate(SAMPLES[1].question, [SAMPLES[1].image], max_new_tokens=4) for pipe in pipes))
    ended = streams.pop(min(1, places - 1))
    with pytest.raises(BackendError, match=r"another was started .* one batch, or load a second Pipeline"):
        list(ended)
    for number, stream in zip((0, 2, 3), streams, strict=False):
        list(stream)
        expected = begin(bundle, number)
        list(expected)
        same(stream.result, expected.result)


def test_an_overwritten_encode_is_refused(pipes, monkeypatch):
    plans = pipes[0]
    monkeypatch.setattr(plans.vision_cache, "max_bytes", 0)  # which would keep a copy of it
    first, second = (
        plans.vision_cache.encode([(inputs, plans.processor.layout(inputs))])[0]
        for inputs in (plans.prepare(s.question, [s.image]) for s in SAMPLES[:2])
    )
    np.testing.assert_array_equal(second.numpy().shape, (64, 256))
    with pytest.raises(BackendError, match="overwritten"):
        first.numpy()


def test_the_command_line_takes_tensorrt_for_an_engine_folder(tiny_bundle, tmp_path, capsys, repository):
    from hawk_trt.apps.cli.main import main

    out = engine_folder(tiny_bundle, tmp_path / "engines", "tensorrt")
    image = repository / "examples" / "tiny-vlm" / "samples" / "0-colour.png"
    answers = []
    with Machines() as machines:
        for folder in (tiny_bundle, out):
            assert main(["run", str(folder), "--image", str(image), "--prompt", SAMPLES[0].question, "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out))
        assert machines.driver.calls["cuGraphLaunch"] or len(answers[1]["token_ids"]) < 3
        assert ("decoder", 0) in machines.trt.enqueues
        assert main(["run", str(out), "--image", str(image), "--prompt", "?", "--verify"]) == 0
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["kept_indices"] == answers[1]["kept_indices"]
