"""The batcher on the tiny model: every answer is generate's, whoever joins or leaves beside it."""

import gc
import threading

import numpy as np
import pytest

from batched import KEPT, LONG, SAMPLES, held, question, text_job
from hawk_trt import ModelInputs, Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.errors import InvalidInput
from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.scheduler import Scheduler
from hawk_trt.sequence import Sequence
from served import Heard, alone, ask, assert_same, assert_served_as_alone
from trt_machine import Machines, engine_folder

PRUNINGS = (
    KEPT,
    PruningConfig(1.0),
    PruningConfig(0.5, selector="divprune"),
    PruningConfig(0.5, quota="per-image"),
    PruningConfig(0.4, keep_mass=0.5, query="turn"),
)


def test_unlike_jobs_that_join_and_leave_are_answered_as_generate_answers_them(pipe):
    jobs = [
        ask(
            question(pipe, number),
            PRUNINGS[number % len(PRUNINGS)],
            3 + 9 * (number % 8),
            SamplingConfig(temperature=8.0 * (number % 2), top_p=0.9, seed=number),
            stop=("red", "e") if number % 7 == 3 else (),
            ignore_eos=number % 4 > 0,
            return_logits=True,
        )
        for number in range(20)
    ]
    with Batcher(pipe, max_batch=6) as batcher:
        assert_served_as_alone(pipe, batcher, jobs)
        assert (batcher.running, batcher.queued, batcher.counters.finished) == (0, 0, 20)
        for client in [Heard() for _ in range(2)]:  # alone, with a cache that grows
            job = ask(question(pipe, 0), KEPT, LONG, ignore_eos=True, return_logits=True)
            batcher.submit(job, client)
            assert_same(client, alone(pipe, job))


def test_clients_may_prepare_and_submit_in_threads_of_their_own(inplace):
    jobs = {n: ask(question(inplace, n), KEPT, 6, ignore_eos=True, return_logits=True) for n in range(12)}
    expected = {n: alone(inplace, job) for n, job in jobs.items()}
    heard = {n: Heard() for n in jobs}
    failures = []

    def client(number):
        try:
            for n in range(number, 12, 4):
                inputs = question(inplace, n)
                np.testing.assert_array_equal(inputs.input_ids, jobs[n].prompt.input_ids)
                batcher.submit(ask(inputs, KEPT, 6, ignore_eos=True, return_logits=True), heard[n])
        except BaseException as error:
            failures.append(error)
            raise

    with Batcher(inplace) as batcher:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for n, client_heard in heard.items():
        assert_same(client_heard, expected[n])


def test_a_client_that_leaves_takes_its_row_and_memory_along_and_no_other(pipe):
    stays = [text_job(pipe, 30), text_job(pipe, 40)]
    with Batcher(pipe) as batcher:
        gate = held(batcher, pipe)
        heard = [Heard() for _ in stays]
        for job, client in zip(stays, heard, strict=True):
            batcher.submit(job, client)
        waiting, running = Heard(), Heard()
        leaving = batcher.submit(text_job(pipe, LONG), waiting)
        batcher.cancel(leaving)
        assert batcher.queued == 2

        def leave(event):
            running(event)
            if len(running.events) == 3:
                batcher.cancel(ticket)

        ticket = batcher.submit(text_job(pipe, LONG), leave)
        gate.gate.set()
        for job, client in zip(stays, heard, strict=True):
            assert_same(client, alone(pipe, job))
        assert_same(gate, alone(pipe, text_job(pipe, LONG)))
    assert waiting.events == []
    assert len(running.events) == 3
    assert batcher.counters.cancelled == 2
    assert (batcher.cache_bytes, batcher.running, batcher.queued) == (0, 0, 0)


@pytest.mark.parametrize(
    ("lengths", "fit"),
    [
        ([15, 15, 50, 200, 15, 100, 10, 125], (1, 200)),  # the longest alone, or several others
        ([30, 30, 8, 30, 8, 30, 30], (3, 30)),  # a row joins as soon as another has left
    ],
)
def test_the_cache_stays_within_its_bound_and_no_job_overtakes_another(pipe, monkeypatch, lengths, fit):
    jobs = [text_job(pipe, length) for length in lengths]
    rows, length = fit
    columns = len(jobs[0].prompt.input_ids) + length - 1
    column_bytes = pipe.bundle.manifest.kv_bytes_per_token
    bound_mb = (rows * columns + 0.5) * column_bytes / 1e6
    seen, order = [], []
    step, run_prompts = Scheduler.step, Scheduler._run_prompts

    def measured(scheduler):
        moved = step(scheduler)
        if scheduler.running:
            seen.append((len(scheduler.running), scheduler.cache_bytes))
        return moved

    def measured_prefill(scheduler, sequences):
        made = run_prompts(scheduler, sequences)
        seen.append((1, scheduler.cache_bytes + sum(row.nbytes for row in made[1].rows)))
        return made

    monkeypatch.setattr(Scheduler, "step", measured)
    monkeypatch.setattr(Scheduler, "_run_prompts", measured_prefill)
    with Batcher(pipe, max_cache_mb=bound_mb) as batcher:
        heard = [Heard() for _ in jobs]
        for number, (job, client) in enumerate(zip(jobs, heard, strict=True)):

            def hear(event, number=number, client=client):
                if not client.events:
                    order.append(number)
                client(event)

            batcher.submit(job, hear)
        with pytest.raises(InvalidInput, match=rf"up to 900 to generate, .* expected at most {bound_mb:.1f} MB"):
            batcher.submit(text_job(pipe, 900), Heard())
        for client in heard:
            client.result()
    monkeypatch.undo()
    for job, client in zip(jobs, heard, strict=True):
        assert_same(client, alone(pipe, job))
    assert order == list(range(len(jobs)))
    assert max(rows for rows, _ in seen) > 1
    assert all(0 < size <= bound_mb * 1e6 for _, size in seen)


def test_at_most_one_prefill_runs_between_two_steps(inplace, monkeypatch):
    order = []
    for name in ("_decode", "_prefill"):
        plain = getattr(Scheduler, name)
        monkeypatch.setattr(
            Scheduler, name, lambda *args, plain=plain, name=name: (order.append(name[1:]), plain(*args))[1]
        )
    with Batcher(inplace) as batcher:
        gate = held(batcher, inplace)
        for number in range(6):  # short and long in turn, so that none shares a prefill
            words = "Hello? " * (1 + 30 * (number % 2))
            batcher.submit(ask(inplace.prepare(words), KEPT, 20, ignore_eos=True), Heard())
        gate.gate.set()
    assert order.count("prefill") == 7
    assert "prefill prefill" not in " ".join(order)


def test_prompts_of_like_length_that_wait_share_a_prefill(pipe):
    inputs = [pipe.prepare(SAMPLES[n].question, [SAMPLES[n].image]) for n in range(5)]
    jobs = [ask(one, KEPT, 4 + n, ignore_eos=True, return_logits=True) for n, one in enumerate(inputs)]
    jobs.append(ask(inputs[0], PruningConfig(0.2, head_weights=(2.0,) * 4 + (1.0,) * 4), 4))  # they share no scores
    expected = [alone(pipe, job) for job in jobs]
    with Batcher(pipe) as batcher:
        gate, heard = held(batcher, pipe), [Heard() for _ in jobs]
        for job, client in zip(jobs, heard, strict=True):
            batcher.submit(job, client)
        gate.gate.set()
        for client, result in zip(heard, expected, strict=True):
            assert_same(client, result)
        assert batcher.counters.prefills == 3
    seconds = [client.result().timings for client in heard[:5]]
    assert all(0 < times.decode < times.total for times in seconds)
    assert seconds[0].decode < seconds[4].decode, "each row counts its own steps"


def held_in_memory():
    gc.collect()
    return sorted(type(thing).__name__ for thing in gc.get_objects() if type(thing) in (KVCache, Sequence))


def test_after_hundreds_of_jobs_no_cache_and_no_row_is_left(inplace):
    before = held_in_memory()  # what the logs of failures before this test hold
    inputs = [question(inplace, number) for number in range(3)]
    with Batcher(inplace) as batcher:
        heard = [Heard() for _ in range(240)]
        for number, client in enumerate(heard):
            ticket = batcher.submit(ask(inputs[number % 3], KEPT, 2 + number % 5, ignore_eos=True), client)
            if number % 10 == 9:
                batcher.cancel(ticket)
        batcher.close()
        assert batcher.counters.finished + batcher.counters.cancelled == 240
    del ticket
    assert held_in_memory() == before
    assert "KVCache" not in before


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_engines_answer_jobs_together_or_one_after_the_other_as_generate_does(tiny_bundle, tmp_path, target):
    folder = engine_folder(tiny_bundle, tmp_path / "engines", target)
    with Machines() as machines, Pipeline.load(folder) as pipe, Batcher(pipe) as batcher:
        jobs = [ask(question(pipe, number), KEPT, 5, ignore_eos=True) for number in range(3)]
        heard = [Heard() for _ in jobs]
        for job, client in zip(jobs, heard, strict=True):
            batcher.submit(job, client)
        results = [client.result() for client in heard]
        with pytest.raises(InvalidInput, match="these engines hold 320"):
            batcher.submit(ask(ModelInputs([5] * 321), KEPT, 1), Heard())
        batcher.close()
        for result, job in zip(results, jobs, strict=True):
            assert result.token_ids == alone(pipe, job).token_ids
        assert machines.driver.faults == []
