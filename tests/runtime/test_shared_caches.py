"""KV caches that generations share, as on a GPU, here on the CPU: slots, addresses that stand still, captured steps."""

import numpy as np
import pytest

from examples.tiny_task import generate
from generations import answer, assert_alone, come_and_go, outgrow, start
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Request
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import collate
from hawk_trt.runtime import onnxruntime
from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.runtime.session import Binding

SAMPLES = list(generate(17, 4))
KEPT = PruningConfig(0.2)


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with Pipeline.load(tiny_bundle, target="cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture
def shared(tiny_bundle, request):
    with Pipeline.load(tiny_bundle, target=getattr(request, "param", "cuda"), threads=1) as pipe:
        pipe.backend.caches.shared = True
        yield pipe


both = pytest.mark.parametrize("shared", ["cuda", "portable"], indirect=True)


def ask(number, new_tokens=6):
    sample = SAMPLES[number]
    options = {"max_new_tokens": new_tokens, "ignore_eos": True, "return_logits": True}
    return Request(sample.question, [sample.image], pruning=KEPT, **options)


def addresses(pipe):
    (cache,) = pipe.backend.caches._caches
    return [tensor.data_ptr() for layer in range(4) for tensor in cache.tensors(layer)], cache.steps


@both
def test_tensors_and_steps_stand_still_from_one_generation_to_the_next(shared, plain):
    assert_alone(plain, answer(shared, ask(0)), ask(0), 1e-4)
    before, steps = addresses(shared)
    step = steps[1]
    for number in (1, 2):
        assert_alone(plain, answer(shared, ask(number)), ask(number), 1e-4)
        after, steps = addresses(shared)
        assert after == before and steps == {1: step}


def test_columns_are_whole_steps_and_a_cache_that_is_far_too_large_goes(shared):
    caches = shared.backend.caches
    row, step = start(shared, 2000)
    long, _ = row.place
    assert (long.columns + 1) % 256 == 0 and long.columns >= 2000
    assert long.tensors(0)[0].shape()[2] % 8 == 0
    del row, step
    assert start(shared, 1000)[0].place[0] is long  # which was idle
    short, _ = start(shared, 100)
    assert short.place[0].columns == 255 and len(caches._caches) == 1


@both
def test_what_a_generation_left_spoils_no_later_one(shared, plain):
    answer(shared, ask(0))
    (cache,) = shared.backend.caches._caches
    for layer in range(4):
        for tensor in cache.tensors(layer):
            tensor.numpy()[:] = np.nan
    assert_alone(plain, answer(shared, ask(1)), ask(1), 1e-4)


@both
def test_a_slot_is_emptied_from_one_row_of_zeros_for_all_layers(shared, monkeypatch):
    answer(shared, ask(0))
    made = []
    zeros = type(shared.backend.place).zeros
    monkeypatch.setattr(type(shared.backend.place), "zeros", lambda *_: made.append(1) or zeros(*_))
    shared.backend.caches.take(1, 40)
    assert len(made) == 1


def test_rows_come_and_go_without_a_copy_where_slots_are_free(shared, plain, monkeypatch):
    shared.generate_batch([ask(0), ask(1), ask(2)])  # a cache of three
    copies, carry = [], KVCache.carry

    def carried(cache, parts, slots, spent):
        copies.extend(parts)
        carry(cache, parts, slots, spent)

    monkeypatch.setattr(KVCache, "carry", carried)
    answered = come_and_go(shared, ask)
    assert not copies
    for request, result in answered:
        assert_alone(plain, result, request, 1e-4)


@pytest.mark.parametrize("on_host", [True, False])
@both
def test_rows_move_to_a_larger_cache_and_answer_as_alone(shared, plain, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr(KVCache, "_copy", KVCache._copy_by_heads)  # as on a GPU
    for request, result in outgrow(shared, ask):
        assert_alone(plain, result, request, 1e-4)
    assert len(shared.backend.caches._caches) == 1


def test_two_generations_that_take_turns_do_not_touch_each_other(shared):
    alone, step = start(shared, 40)
    expected = [int(step(number).next_token[0]) for number in range(4)]
    del alone, step
    shared.backend.caches.take(3, 40)  # slots for both in one cache
    (cache,) = (cache for cache in shared.backend.caches._caches if cache.slots == 3)
    shared.backend.caches.give_back([(cache, slot) for slot in range(3)])
    first, step_first = start(shared, 40)
    second, step_second = start(shared, 40)
    assert first.place[0] is second.place[0] is cache
    got = [(int(step_first(n).next_token[0]), int(step_second(n).next_token[0])) for n in range(4)]
    assert got == [(token, token) for token in expected]


class Captures:
    """The run option that tells graphs apart, of every run."""

    def __init__(self, pipe, monkeypatch):
        self.graphs = []
        self.fail = False
        for stage in list(pipe.backend.stages.values())[1:]:
            stage.can_capture = True
            run = stage.session.run_with_iobinding

            def told(binding, options, run=run):
                graph = options.get_run_config_entry("gpu_graph_id")
                self.graphs.append(int(graph))
                if self.fail and graph != "-1":
                    raise BackendError("operation not permitted when stream is capturing")
                run(binding, options)

            monkeypatch.setattr(stage.session, "run_with_iobinding", told)


@pytest.fixture
def captures(shared, monkeypatch):
    return Captures(shared, monkeypatch)


def test_a_decode_step_is_captured_at_its_second_run_and_prefills_never(shared, captures, plain):
    assert_alone(plain, answer(shared, ask(0, 5)), ask(0, 5), 1e-4)
    first, decoder = captures.graphs[4:6]
    assert captures.graphs == [-1, -1, -1, -1, *[first, decoder] * 3] and first != decoder
    captures.graphs.clear()
    assert_alone(plain, answer(shared, ask(1, 5)), ask(1, 5), 1e-4)
    assert captures.graphs == [-1, -1, *[first, decoder] * 4]
    assert shared.backend.place.num_captured == 1


def test_each_number_of_rows_is_a_graph_of_its_own(shared, captures):
    shared.generate_batch([ask(0, 5), ask(1, 5)])
    answer(shared, ask(2, 5))
    assert shared.backend.place.num_captured == 2
    assert len({graph for graph in captures.graphs if graph > 0}) == 4


def test_a_capture_that_fails_is_told_once_and_the_answer_goes_on(shared, captures, plain):
    captures.fail = True
    with pytest.warns(RuntimeWarning, match="decode runs without a CUDA graph, slower: operation not permitted"):
        result = answer(shared, ask(0, 5))
    assert_alone(plain, result, ask(0, 5), 1e-4)
    captures.graphs.clear()
    answer(shared, ask(1, 5))
    assert set(captures.graphs) == {-1}


@pytest.mark.usefixtures("captures")
def test_graphs_go_with_their_cache_where_onnx_runtime_can(shared, monkeypatch):
    gone = []
    monkeypatch.setattr(Binding, "forget_graph", lambda binding: gone.append(binding._graph))
    answer(shared, ask(0, 5))
    shared.backend.caches.close()
    assert len(set(gone)) == 2 and all(gone)


def test_a_step_writes_to_the_device_and_takes_no_memory_there(shared, monkeypatch):
    row, step = start(shared, 40)
    step(0)
    taken = []
    for name in ("empty", "zeros", "upload"):
        monkeypatch.setattr(type(shared.backend.place), name, lambda *_: taken.append(1))
    for number in range(1, 4):
        step(number)
    assert not taken and row.cache(0)[0].shape[1] == 8


def test_rows_that_lie_apart_or_have_no_place_are_refused(plain):
    (first, _), (second, _) = start(plain, 20), start(plain, 20)
    token = np.array([5])
    with pytest.raises(BackendError, match="got some of several KV caches, expected to gather them first"):
        plain.backend.decode([first, second], token, token, logits=False)
    first.release()
    for row, message in ((first, "row: it was released"), (object(), "row: got object")):
        with pytest.raises(BackendError, match=message):
            plain.backend.decode([row], token, token, logits=False)
    assert (first.nbytes, second.nbytes > 0) == (0, True)


def test_prompts_padded_in_front_are_refused_since_no_mask_hides_the_padding(shared):
    prompts = [ModelInputs(np.arange(length)) for length in (4, 9)]
    layouts = [shared.processor.layout(inputs) for inputs in prompts]
    heads = np.array(shared.bundle.manifest.head_weights.values, np.float32)
    visual, _ = shared.vision_cache.encode(list(zip(prompts, layouts, strict=True)))
    with pytest.raises(BackendError, match="kv_start: got prompts padded in front"):
        shared.backend.prefill(collate(layouts, [0, 0], [None, None], heads), visual, 20, logits=False)


def test_an_onnx_runtime_without_causal_attention_over_a_cache_is_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime.ort, "__version__", "1.27.0")
    with pytest.raises(BackendError, match=r"target: got cuda, .* ONNX Runtime 1\.27\.0 .* expected 1\.28 or newer"):
        Pipeline.load(tiny_bundle, target="cuda")
