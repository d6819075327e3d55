"""Hybrid models in the runtime: states of linear layers beside the KV cache, which no other request may touch."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from generations import answer, assert_alone, come_and_go, outgrow, start
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.runtime import onnxruntime
from hawk_trt.runtime.kv_cache import CachePool, KVCache
from hawk_trt.runtime.not_finite import first_not_finite
from hawk_trt.runtime.trace import traced
from hawk_trt.scheduler import Scheduler
from hybrid import PROMPTS, ask, export_random


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export_random(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def plain(bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, target="cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def portable(bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, target="portable", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def cuda(bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, target="cuda", threads=1) as pipe:
        yield pipe


@pytest.fixture(params=["cuda", "portable"])
def shared(request, cuda, portable, monkeypatch) -> Pipeline:
    """As on a GPU: caches that generations share, states written beside."""
    pipe = {"cuda": cuda, "portable": portable}[request.param]
    monkeypatch.setattr(pipe.backend, "caches", CachePool(pipe.backend.stages, shared=True))
    return pipe


@pytest.fixture(scope="module", params=["cpu", "portable"])
def either(request, plain, portable) -> Pipeline:
    return {"cpu": plain, "portable": portable}[request.param]


def test_prompts_padded_to_one_length_answer_as_alone(either, plain):
    requests = [ask(number) for number in range(4)]
    before = either.generate_batch(requests)
    for result, request in zip(before, requests, strict=True):
        assert_alone(plain, result, request, 1e-3)  # 3e-4 seen


def test_a_state_that_was_decoded_is_that_of_a_longer_prompt(either):
    words = np.arange(20, 60)
    forced = traced(either, ModelInputs(words[:30]), PruningConfig(keep_ratio=1.0), words[30:].tolist())
    for count in (0, 1, 5, 10):
        whole = traced(either, ModelInputs(words[: 30 + count]), PruningConfig(keep_ratio=1.0))
        np.testing.assert_allclose(forced.logits[count], whole.logits[0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(forced.kv_norms[0], np.full((2, 40), forced.kv_norms[0, :, :1]))
    np.testing.assert_allclose(forced.kv_norms[:, :, 0], whole.kv_norms[:, :, 0], rtol=1e-4)


def test_requests_come_and_go_and_answer_as_alone(either, plain):
    scheduler = Scheduler(either.bundle, either.processor, either.vision_cache, either.backend, room=2)
    lengths = (3, 12, 9, 7)
    sequences = [scheduler.add(ask(number, length)) for number, length in zip((0, 1), lengths, strict=False)]
    dropped = scheduler.add(ask(3, 30))
    for _ in range(4):
        scheduler.step()
    sequences.append(scheduler.add(ask(2, 9)))
    for _ in range(3):
        scheduler.step()
    scheduler.drop(dropped)
    sequences.append(scheduler.add(ask(3, 7)))
    while not scheduler.idle:
        scheduler.step()
    for sequence, number, length in zip(sequences, range(4), lengths, strict=True):
        assert_alone(plain, sequence.result(), ask(number, length), 1e-3)


def test_a_row_that_a_stop_string_ends_leaves_the_others_as_they_are(either, plain):
    whole = answer(plain, ask(1, 8))
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = replace(ask(1, 8), stop=(stop,))
    results = either.generate_batch([ask(0, 12), cut, ask(2, 12)])
    assert results[1].finish_reason == "stop" and results[1].text == whole.text[: whole.text.index(stop)]
    for number in (0, 2):
        assert_alone(plain, results[number], ask(number, 12), 1e-3)


def test_a_streamed_answer_is_that_of_a_batch(either, plain):
    stream = either.stream(PROMPTS[0], pruning=PruningConfig(0.3), max_new_tokens=8, ignore_eos=True)
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == stream.result.text == answer(plain, ask(0, 8)).text


def test_an_onnx_runtime_without_linear_attention_takes_portable_graphs(bundle, plain, monkeypatch):
    monkeypatch.setattr(onnxruntime.ort, "__version__", "1.24.4")
    with Pipeline.load(bundle, threads=1) as pipe:
        assert pipe.backend.target == "portable"
        assert answer(pipe, ask(0)).token_ids == answer(plain, ask(0)).token_ids
    with pytest.raises(BackendError, match=r"got cpu, whose linear attention ONNX Runtime 1\.24\.4 lacks.* 1\.25 or"):
        Pipeline.load(bundle, target="cpu")


def test_a_prompt_beyond_the_chunks_of_portable_graphs_is_refused(portable, monkeypatch):
    monkeypatch.setattr(onnxruntime, "MAX_LINEAR_TOKENS", 30)
    assert answer(portable, ask(3)).token_ids
    with pytest.raises(BackendError, match=r"prompt: got 40 tokens, expected at most 30 .* take target cpu"):
        portable.generate(ModelInputs(np.arange(20, 60)), max_new_tokens=1)


@pytest.mark.parametrize(
    "pruning",
    [
        {"quota": "per-image"},
        {"keep_mass": 0.5},
        {"diversity": 0.5},
        {"selector": "divprune"},
        {"selector": "cdpruner"},
        {"selector": "random"},
        {"selector": "fastv-input"},
    ],
    ids=str,
)
def test_a_choice_of_the_host_leaves_the_states_of_one_run(plain, pruning):
    result = answer(plain, ask(1, **pruning))
    layout = plain.processor.layout(PROMPTS[1])
    places = layout.source_index[layout.visual_rows >= 0]
    kept = np.flatnonzero(np.isin(places, result.kept_indices))
    assert 0 < len(kept) < len(places)
    # the same tokens chosen without scores: first_layer runs once
    once = answer(plain, ask(1, keep_ratio=(len(kept) - 0.5) / len(places), selector=lambda *_: kept))
    assert once.token_ids == result.token_ids
    np.testing.assert_array_equal(once.kept_indices, result.kept_indices)
    np.testing.assert_allclose(once.logits, result.logits, rtol=0, atol=1e-5)


def test_portable_graphs_leave_the_states_of_cpus(plain, portable):
    one, other = (traced(pipe, PROMPTS[1], PruningConfig(keep_ratio=0.4), [5, 9, 11]) for pipe in (plain, portable))
    np.testing.assert_array_equal(one.kept_indices, other.kept_indices)
    np.testing.assert_allclose(one.kv_norms, other.kv_norms, rtol=1e-4)
    np.testing.assert_allclose(one.hidden_states, other.hidden_states, rtol=0, atol=1e-3)  # 1.1e-4 seen, of 15


def test_dropped_tokens_change_the_states_of_the_first_layers_alone(plain):
    """Layers 0 to 2 see every token, whatever is kept; the layers behind see the kept ones."""
    few, all_kept = (traced(plain, PROMPTS[0], PruningConfig(keep_ratio=ratio)) for ratio in (0.3, 1.0))
    np.testing.assert_allclose(few.kv_norms[:3, :, 0], all_kept.kv_norms[:3, :, 0], rtol=1e-5)
    assert (np.abs(few.kv_norms[4:7, 1, 0] / all_kept.kv_norms[4:7, 1, 0] - 1) > 1e-3).all()


def test_states_count_in_the_bytes_of_a_cache(plain):
    manifest = plain.bundle.manifest
    # 6 linear layers: (2 x 2 x 8 + 4 x 12) channels of 3 columns, 4 heads of 8 x 12, float32
    assert manifest.state_bytes == 6 * 4 * (80 * 3 + 4 * 8 * 12)
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert start(plain, 10)[0].nbytes == manifest.cache_bytes(10)
    result = answer(plain, ask(0, 1))
    needed = manifest.cache_bytes(len(result.kept_indices))
    for bound, fits in ((needed, True), (needed - 1, False)):
        scheduler = Scheduler(plain.bundle, plain.processor, plain.vision_cache, plain.backend, max_cache_bytes=bound)
        if fits:
            scheduler.add(ask(0, 1))
        else:
            with pytest.raises(InvalidInput, match="of KV cache"):
                scheduler.add(ask(0, 1))


def test_a_number_that_is_not_finite_is_told_by_its_stage_and_layer(plain):
    row, _ = start(plain, 10)
    language = plain.bundle.manifest.language
    told = first_not_finite(None, row, language)
    assert told.startswith("All keys and values are finite")
    for layer, stage in ((5, "decoder, layer 5"), (2, "first_layer, layer 2")):
        row.place[0].tensors(layer)[1].numpy()[:] = np.nan
        assert f"is in {stage}: layer {layer - 1}'s output" in first_not_finite(None, row, language)


# -- caches that generations share


def test_generations_that_take_turns_do_not_touch_each_others_states(shared, plain):
    cache, slots = shared.backend.caches.take(3, 60)
    shared.backend.caches.give_back([(cache, slot) for slot in slots])
    schedulers = [Scheduler(shared.bundle, shared.processor, shared.vision_cache, shared.backend) for _ in range(3)]
    sequences = [scheduler.add(ask(number, 6)) for number, scheduler in enumerate(schedulers)]
    while not all(sequence.finished for sequence in sequences):
        for scheduler in schedulers:
            scheduler.step()
    assert len(shared.backend.caches._caches) == 1
    for number, sequence in enumerate(sequences):
        assert_alone(plain, sequence.result(), ask(number, 6), 1e-3)


@pytest.mark.parametrize("shared", ["cuda"], indirect=True)
def test_rows_come_and_go_in_a_shared_cache_without_a_copy_of_keys(shared, plain, monkeypatch):
    shared.generate_batch([ask(0), ask(1), ask(2)])  # a cache of three
    copies = []
    monkeypatch.setattr(KVCache, "_copy", lambda *_: copies.append(1))
    answered = come_and_go(shared, ask)
    assert not copies
    for request, result in answered:
        assert_alone(plain, result, request, 1e-3)


def test_rows_move_to_a_larger_shared_cache_with_their_states(shared, plain):
    for request, result in outgrow(shared, ask):
        assert_alone(plain, result, request, 1e-3)


def test_a_slot_that_was_used_begins_with_empty_states(shared, plain):
    answer(shared, ask(0))
    (cache,) = shared.backend.caches._caches
    for layer in range(8):
        for tensor in cache.tensors(layer):
            tensor.numpy()[:] = np.nan
    assert_alone(plain, answer(shared, ask(1)), ask(1), 1e-3)


@pytest.mark.parametrize("shared", ["cuda"], indirect=True)
def test_a_step_that_runs_twice_while_it_is_captured_changes_states_once(shared, plain, monkeypatch):
    captured = set()
    for stage in list(shared.backend.stages.values())[1:]:
        monkeypatch.setattr(stage, "can_capture", True)
        run = stage.session.run_with_iobinding

        def told(binding, options, run=run):
            graph = options.get_run_config_entry("gpu_graph_id")
            run(binding, options)
            if graph != "-1" and graph not in captured:  # ONNX Runtime warms up, captures and replays
                captured.add(graph)
                run(binding, options)

        monkeypatch.setattr(stage.session, "run_with_iobinding", told)
    for number in (0, 1):
        assert_alone(plain, answer(shared, ask(number, 6)), ask(number, 6), 1e-3)
    assert len(captured) == 4  # both stages, for the states in either memory
    before = [result.token_ids for result in shared.generate_batch([ask(0, 6), ask(1, 6)])]
    assert before == [answer(plain, ask(number, 6)).token_ids for number in (0, 1)]
