"""The batcher on the tiny model: what fails, is late or is refused costs no other answer."""

import threading
import time

import numpy as np
import pytest

from batched import KEPT, LONG, held, question, text_job
from hawk_trt import ModelInputs, PruningConfig
from hawk_trt.apps.serve.batcher import Batcher, Stopping
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.scheduler import Scheduler
from served import Heard, alone, ask, assert_same


def test_numbers_that_are_not_finite_end_their_own_row_alone(pipe):
    scheduler = Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend, room=64)
    jobs = [ask(question(pipe, n), KEPT, 12, ignore_eos=True, return_logits=True) for n in range(3)]
    rows = [scheduler.add(job) for job in jobs]
    while len(scheduler.running) < 3 or rows[1].row.place[0] is not rows[0].row.place[0]:
        scheduler.step()
    cache, slot = rows[1].row.place
    cache.tensors(2)[0].numpy()[slot, :, -40:] = np.nan
    while rows[1].error is None:
        scheduler.step()
    assert isinstance(rows[1].error, BackendError)
    assert "decoder, layer 2" in str(rows[1].error)
    while not scheduler.idle:
        scheduler.step()
    for number in (0, 2):
        expected = alone(pipe, jobs[number])
        assert rows[number].token_ids == expected.token_ids
        np.testing.assert_allclose(rows[number].result().logits, expected.logits, rtol=0, atol=1e-4)


def test_a_prompt_that_fails_ends_no_other_answer(inplace):
    inputs = question(inplace, 0)
    broken = ModelInputs(
        inputs.input_ids, None, np.full_like(inputs.pixel_values, np.nan), image_grid_thw=inputs.image_grid_thw
    )

    def raising(*_):
        raise KeyError("of the caller's own")

    with Batcher(inplace) as batcher:
        gate = held(batcher, inplace)
        heard = [Heard(), Heard()]
        batcher.submit(ask(broken, PruningConfig(1.0), 8), heard[0])
        batcher.submit(ask(inputs, PruningConfig(0.5, selector=raising), 8), heard[1])
        fine = Heard()
        batcher.submit(text_job(inplace), fine)
        with pytest.raises(InvalidInput, match="input_ids"):
            batcher.submit(ask(ModelInputs([10**6]), KEPT), Heard())
        gate.gate.set()
        assert_same(fine, alone(inplace, text_job(inplace)))
        assert_same(gate, alone(inplace, text_job(inplace, LONG)))
    with pytest.raises(BackendError, match="vision's visual_embeds"):
        heard[0].result()
    with pytest.raises(BackendError, match="KeyError"):
        heard[1].result()


def test_a_listener_that_raises_ends_its_own_job_alone(inplace):
    def listener(_):
        raise RuntimeError("gone")

    with Batcher(inplace) as batcher:
        batcher.submit(text_job(inplace, LONG), listener)
        client = Heard()
        batcher.submit(text_job(inplace), client)
        assert_same(client, alone(inplace, text_job(inplace)))
    assert batcher.counters.cancelled == 1


def test_after_a_step_that_fails_its_rows_hear_so_and_the_next_have_a_fresh_cache(inplace, monkeypatch):
    with Batcher(inplace) as batcher:
        gate = held(batcher, inplace)
        client, next_client = Heard(), Heard()
        batcher.submit(text_job(inplace, LONG), client)

        def failing(*_):
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(type(inplace.backend.caches), "gather", failing)
        gate.gate.set()
        for failed in (gate, client):
            with pytest.raises(BackendError, match="MemoryError"):
                failed.result()
        batcher.submit(text_job(inplace), next_client)
        assert_same(next_client, alone(inplace, text_job(inplace)))


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_what_was_taken_or_says_that_it_will_not(inplace, drain):
    batcher = Batcher(inplace, max_batch=2)
    assert batcher.ready
    gate = held(batcher, inplace)
    heard = [Heard() for _ in range(4)]
    for client in heard:
        batcher.submit(text_job(inplace), client)
    closing = threading.Thread(target=batcher.close, args=(None if drain else 0.0,))
    closing.start()
    while batcher.ready:
        time.sleep(0.01)
    with pytest.raises(Stopping):
        batcher.submit(text_job(inplace), Heard())
    gate.gate.set()
    closing.join(60)
    assert not closing.is_alive()
    for client in heard:
        if drain:
            assert_same(client, alone(inplace, text_job(inplace)))
        else:
            with pytest.raises(Stopping):
                client.result()
    assert batcher.cache_bytes == 0


def test_a_drain_that_takes_too_long_is_cut_short(inplace):
    batcher = Batcher(inplace)
    client = Heard()
    batcher.submit(text_job(inplace, 4000), client)
    assert client.begun.wait(60)
    batcher.close(0.0)
    with pytest.raises(Stopping):
        client.result()
