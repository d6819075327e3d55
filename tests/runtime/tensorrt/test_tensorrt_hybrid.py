"""Hybrid models on TensorRT's stand-in: states beside the KV cache, for each slot its own, whoever runs along."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.checks.verify import verify
from generations import assert_alone
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.runtime.reference import Reference
from hawk_trt.runtime.trace import traced
from hawk_trt.scheduler import Scheduler
from hawk_trt.stages import PORTABLE, TENSORRT
from hybrid import PROMPTS, ask, export_random
from trt_machine import engine_folder

pytestmark = pytest.mark.usefixtures("machines")
TARGETS = (TENSORRT, PORTABLE)
LIMITS = {"max_visual_tokens": 128, "max_prompt_tokens": 192, "max_context": 160}
# 6 linear layers: (2 x 2 x 8 + 4 x 12) channels of 3 columns, 4 heads of 8 x 12, float32
ROW_BYTES = (80 * 3 * 4, 4 * 8 * 12 * 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return export_random(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def folders(bundle, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("engines")
    return {target: engine_folder(bundle, out / target, target, **LIMITS) for target in TARGETS}


@pytest.fixture(scope="module")
def plain(bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, target="cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(params=TARGETS)
def engines(request, folders, machines) -> Iterator[Pipeline]:  # noqa: ARG001 - they stand in for TensorRT
    with Pipeline.load(folders[request.param]) as pipe:
        yield pipe


def test_answers_are_those_of_onnx_runtime_alone_and_padded_to_one_length(engines, plain):
    for number in range(4):
        (result,) = engines.generate_batch([ask(number)])
        assert_alone(plain, result, ask(number), 1e-3)
    requests = [ask(number) for number in range(4)]
    for result, request in zip(engines.generate_batch(requests), requests, strict=True):
        assert_alone(plain, result, request, 1e-3)


def test_every_stage_and_state_is_that_of_onnx_runtime(engines, plain):
    got, expected = (traced(pipe, PROMPTS[1], PruningConfig(keep_ratio=0.4), [5, 9, 11]) for pipe in (engines, plain))
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
    for name in ("scores", "hidden_states", "logits", "kv_norms"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-3, err_msg=name)


def test_a_streamed_answer_is_that_of_onnx_runtime_and_its_step_is_replayed(engines, plain, machines):
    stream = engines.stream(PROMPTS[0], pruning=PruningConfig(0.3), max_new_tokens=8, ignore_eos=True)
    text = "".join(stream)
    (expected,) = plain.generate_batch([ask(0, 8)])
    assert text == expected.text and stream.result.token_ids == expected.token_ids
    assert engines.backend.decode_step.captures == 1
    assert machines.driver.enqueued["decoder 1 (graph)"] == 6


def test_rows_join_and_leave_and_nobody_changes_the_states_of_others(engines, plain):
    """Steps run over slots in between, of nobody and of others; scores for a quota are computed meanwhile."""
    scheduler = Scheduler(engines.bundle, engines.processor, engines.vision_cache, engines.backend, room=64)
    lengths = (3, 12, 9, 8, 10)
    orders = [ask(number % 4, length) for number, length in enumerate(lengths)]
    orders[4] = ask(1, lengths[4], quota="per-image", keep_ratio=0.5)
    sequences = []
    for order in orders:
        sequences.append(scheduler.add(order))
        scheduler.step()
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    for sequence, order in zip(sequences, orders, strict=True):
        assert sequence.error is None
        assert_alone(plain, sequence.result(), order, 1e-3)


def test_generations_that_take_turns_do_not_touch_each_others_states(engines, plain):
    schedulers = [Scheduler(engines.bundle, engines.processor, engines.vision_cache, engines.backend) for _ in range(3)]
    sequences = [scheduler.add(ask(number, 6)) for number, scheduler in enumerate(schedulers)]
    while not all(sequence.finished for sequence in sequences):
        for scheduler in schedulers:
            scheduler.step()
    for number, sequence in enumerate(sequences):
        assert_alone(plain, sequence.result(), ask(number, 6), 1e-3)


def test_a_slot_whose_states_are_not_finite_answers_the_next_prompt_as_any(engines, plain, machines):
    engines.generate_batch([ask(0)])
    cache = engines.backend.cache
    for name, address in cache.addresses().items():
        if name.startswith(("past_conv", "past_state")):
            size = 4 * ROW_BYTES[name.startswith("past_state")]
            machines.driver.block(address, size).view(address, size)[:] = 0xFF
    (result,) = engines.generate_batch([ask(1)])
    assert_alone(plain, result, ask(1), 1e-3)


def test_the_check_after_a_build_judges_each_layer_by_its_stage(folders, plain):
    reference = Reference.make(plain)
    for target in TARGETS:
        found = verify(folders[target], reference)
        assert found.passed, found.failures
        rows = {row.output: row for row in found.rows}
        stages = [rows[f"KV norms of layer {layer}"].stage for layer in range(8)]
        assert stages == ["first_layer"] * 4 + ["decoder"] * 4
        assert rows["tokens"].prompts == 5 and "40 of 40" in rows["tokens"].numbers


def test_states_lie_behind_the_cache_twice_and_one_tensor_of_zeros(folders):
    from hawk_trt.runtime.tensorrt.cache import KVCache
    from hawk_trt.runtime.tensorrt.states import States

    for target in TARGETS:
        manifest = EngineFolder.load(folders[target]).manifest
        sizes = [-(-4 * row // 256) * 256 for row in ROW_BYTES]
        assert States(manifest, 0).nbytes == max(sizes) + 2 * 6 * sum(sizes)
        cache = KVCache(manifest, 1 << 20)
        assert cache.nbytes == KVCache(manifest, 0).nbytes
        step, prompt = cache.addresses(), cache.addresses(2)
        places = [step[f"{side}_{kind}.{n}"] for side in ("past", "present") for kind in ("conv", "state")
                  for n in (0, 1, 2, 4, 5, 6)]  # fmt: skip
        assert len(set(places)) == 24 and all(place % 256 == 0 for place in places)
        assert max(places) + sizes[1] <= (1 << 20) + cache.nbytes
        assert {prompt[f"past_conv.{n}"] for n in (0, 6)} == {prompt["past_state.0"]}  # of zeros
        assert prompt["present_state.5"] == step["present_state.5"]
