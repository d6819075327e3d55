"""The decode step as a CUDA graph: when it is captured, when again, what a token costs, and what it may not do."""

from collections import Counter

import numpy as np
import pytest

from examples.tiny_task import generate
from generations import start
from hawk_trt import Pipeline, PruningConfig, Request
from trt_machine import engine_folder

pytestmark = pytest.mark.usefixtures("machines")
SAMPLES = list(generate(12, 4))


@pytest.fixture
def plans(engines):
    with Pipeline.load(engines) as pipe:
        yield pipe


def answer(pipe, tokens, images=1, **options):
    sample = SAMPLES[0]
    shown = [SAMPLES[i].image for i in range(images)]
    return pipe.generate(sample.question, shown, max_new_tokens=tokens, ignore_eos=True, **options).token_ids


def test_one_plain_enqueue_then_a_capture_then_replays(plans, machines):
    answer(plans, 7)
    enqueued = machines.driver.enqueued
    assert enqueued["decoder 1"] == 1
    assert enqueued["decoder 1 (graph)"] == 5
    assert machines.driver.calls["cuStreamBeginCapture"] == plans.backend.decode_step.captures == 1


def test_the_next_generation_replays_the_same_graph(plans, machines):
    answer(plans, 4)
    answer(plans, 4)
    assert plans.backend.decode_step.captures == 1
    assert machines.driver.enqueued["decoder 1"] == 1


def test_a_replayed_token_is_one_launch_and_one_wait(plans, machines):
    answer(plans, 4)
    sample = SAMPLES[0]
    stream = plans.stream(sample.question, [sample.image], max_new_tokens=9, ignore_eos=True)
    stream._scheduler.step()
    row, position = stream._sequence.row, stream._sequence.position
    prefilled = Counter(machines.driver.calls), Counter(machines.driver.enqueued), len(machines.trt.calls)
    for number in range(8):
        plans.backend.decode([row], np.array([5]), np.array([position + number]), logits=False)
    calls = machines.driver.calls - prefilled[0]
    assert calls == {"cuCtxPushCurrent": 8, "cuCtxPopCurrent": 8, "cuGraphLaunch": 8, "cuStreamSynchronize": 8}
    work = machines.driver.enqueued - prefilled[1]
    assert work == dict.fromkeys(
        ("copy in (graph)", "first_layer 1 (graph)", "decoder 1 (graph)", "copy out (graph)"), 8
    )
    assert len(machines.trt.calls) == prefilled[2]


def test_another_batch_is_captured_anew(plans, tiny_bundle):
    requests = [Request(s.question, [s.image]) for s in SAMPLES[:3]]
    with Pipeline.load(tiny_bundle, threads=1) as bundle:
        for rows in (1, 3, 2):
            options = {"max_new_tokens": 5, "ignore_eos": True}
            got, expected = (pipe.generate_batch(requests[:rows], **options) for pipe in (plans, bundle))
            assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert plans.backend.decode_step.captures == 3


def test_attention_over_more_of_the_cache_is_captured_anew(plans, machines, tiny_bundle):
    keep_all = PruningConfig(keep_ratio=1.0)
    with Pipeline.load(tiny_bundle, threads=1) as bundle:
        # three images: 192 visual tokens and text, so that the answer passes column 256
        expected = answer(bundle, 50, images=3, pruning=keep_all)
    assert answer(plans, 50, images=3, pruning=keep_all) == expected
    assert plans.backend.cache.ends.max() > 256
    assert plans.backend.decode_step.captures == 2
    assert machines.driver.enqueued["decoder 1"] == 2


def test_nothing_in_the_capture_allocates_or_waits(plans, machines):
    calls = []
    driver, original = machines.driver, machines.driver._checked

    def spy(name, function):
        if driver.captured is not None:
            calls.append(name)
        return original(name, function)

    driver._checked = spy
    answer(plans, 3)
    assert calls == ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamEndCapture"]


def test_where_tensorrt_cannot_be_captured_decoding_goes_on_with_a_warning(plans, machines, engines):
    machines.trt.uncapturable = True
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*cannot be captured"):
        plain = answer(plans, 6)
    assert machines.driver.calls["cuGraphLaunch"] == 0
    assert answer(plans, 6) == plain  # and no second warning
    machines.trt.uncapturable = False
    with Pipeline.load(engines) as other:
        assert answer(other, 6) == plain


def test_a_portable_answer_replays_one_graph_and_copies_each_new_column_in_place(tiny_bundle, tmp_path, machines):
    out = engine_folder(tiny_bundle, tmp_path / "engines", "portable", batch=1)
    with Pipeline.load(out) as pipe, Pipeline.load(tiny_bundle, threads=1) as bundle:
        for tokens in (9, 250, 9):
            assert answer(pipe, tokens) == answer(bundle, tokens)
        assert pipe.backend.decode_step.captures == 1
        assert machines.driver.enqueued["decoder 1"] == 1
        _, step = start(pipe, 64)
        step(0)
        before, moved = (Counter(machines.driver.calls), len(machines.trt.calls)), Counter(machines.driver.moved)
        for number in range(1, 9):
            step(number)
        calls = machines.driver.calls - before[0]
        assert {name: calls[name] for name in calls if not name.startswith("cuCtx")} == {
            "cuGraphLaunch": 8,
            "cuMemcpy3DAsync": 8,
            "cuStreamSynchronize": 8,
        }
        assert len(machines.trt.calls) == before[1]
        column = 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, head_dim, bytes
        assert machines.driver.moved["copy rows"] - moved["copy rows"] == 8 * column


def test_a_portable_generation_after_one_that_was_not_finite_is_clean(tiny_bundle, tmp_path, machines):
    out = engine_folder(tiny_bundle, tmp_path / "engines", "portable", batch=1)
    with Pipeline.load(out) as pipe:
        expected = answer(pipe, 9)
        cache = pipe.backend.cache
        start = cache.addresses()["past_key.0"]
        machines.driver.block(start, cache.nbytes).view(start, cache.nbytes)[:] = 0xFF
        cache.finite[0] = False
        assert answer(pipe, 9) == expected
