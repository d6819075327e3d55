"""The batcher on the tiny model: every answer is generate's, whoever joins, leaves, fails or gives up beside it."""

import gc
import threading
import time

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import ModelInputs, Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.errors import BackendError, DeadlinePassed, InvalidInput, QueueFull, Stopping
from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.scheduler import Scheduler
from hawk_trt.sequence import Sequence
from hawk_trt.stages import in_place
from served import Heard, alone, ask, assert_same, assert_served_as_alone
from targets import ON_CPU
from trt_machine import Machines, engine_folder

SAMPLES = list(generate(11, 6))
KEPT = PruningConfig(0.2)
PRUNINGS = (
    KEPT,
    PruningConfig(1.0),
    PruningConfig(0.5, selector="divprune"),
    PruningConfig(0.5, quota="per-image"),
    PruningConfig(0.4, keep_mass=0.5, query="turn"),
)
LONG = 150


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, tiny_bundle):
    with Pipeline.load(tiny_bundle, target=request.param, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def inplace(tiny_bundle):
    with Pipeline.load(tiny_bundle, target="cpu", threads=1) as pipe:
        yield pipe


def question(pipe, number):
    """One image, none, or two."""
    sample = SAMPLES[number % len(SAMPLES)]
    images = ([sample.image], [], [sample.image[:112], SAMPLES[0].image])[number % 3]
    return pipe.prepare(sample.question, images)


def text_job(pipe, max_new_tokens=8, **options):
    return ask(pipe.prepare("Hello?"), KEPT, max_new_tokens, ignore_eos=True, **options)


def held(batcher, pipe):
    """A client that keeps the batcher in its first event, before any other job runs, until its gate is set."""
    client = Heard(gate=threading.Event())
    batcher.submit(text_job(pipe, LONG), client)
    assert client.begun.wait(60)
    return client


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


def test_a_deadline_ends_its_own_job_waiting_or_running(inplace):
    with Batcher(inplace) as batcher:
        gate = held(batcher, inplace)
        late, beside = Heard(), Heard()
        batcher.submit(text_job(inplace), late, time.monotonic())
        job = text_job(inplace, 20)
        batcher.submit(job, beside)
        slow = Heard(gate=threading.Event())
        ticket = batcher.submit(text_job(inplace, LONG), slow, time.monotonic() + 60)
        gate.gate.set()
        assert slow.begun.wait(60)
        ticket.deadline = time.monotonic()
        slow.gate.set()
        assert_same(beside, alone(inplace, job))
    with pytest.raises(DeadlinePassed, match="before the answer had begun"):
        late.result()
    with pytest.raises(DeadlinePassed, match=r"after \d+ tokens"):
        slow.result()
    assert batcher.counters.failed == 2


def test_a_full_queue_refuses_and_keeps_what_it_took(inplace):
    with Batcher(inplace, max_queue=2) as batcher:
        gate = held(batcher, inplace)
        heard = [Heard(), Heard()]
        for client in heard:
            batcher.submit(text_job(inplace), client)
        with pytest.raises(QueueFull, match="2 requests wait"):
            batcher.submit(text_job(inplace), Heard())
        gate.gate.set()
        for client in heard:
            assert_same(client, alone(inplace, text_job(inplace)))


@pytest.mark.parametrize(
    ("lengths", "fit"),
    [
        ([30, 30, 100, 400, 30, 200, 20, 250], (1, 400)),  # the longest alone, or several others
        ([30, 30, 8, 30, 8, 30, 30], (3, 30)),  # a row joins as soon as another has left
    ],
)
def test_the_cache_stays_within_its_bound_and_no_job_overtakes_another(pipe, monkeypatch, lengths, fit):
    jobs = [text_job(pipe, length) for length in lengths]
    rows, length = fit
    columns = len(jobs[0].prompt.input_ids) + length - 1
    column_bytes = pipe.bundle.manifest.kv_bytes_per_token * (1 if in_place(pipe.backend.target) else 2)
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
        seen.append((1, scheduler.cache_bytes + made[0].nbytes))
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


def test_numbers_that_are_not_finite_end_their_own_row_alone(pipe):
    scheduler = Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend, room=64)
    jobs = [ask(question(pipe, n), KEPT, 12, ignore_eos=True, return_logits=True) for n in range(3)]
    rows = [scheduler.add(job) for job in jobs]
    while len(scheduler.running) < 3 or rows[1].generation is not rows[0].generation:
        scheduler.step()
    key, _ = rows[1].generation._cache.tensors(2)
    key.numpy()[rows[1].row, :, -40:] = np.nan
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

        monkeypatch.setattr(type(inplace.backend), "gather", failing)
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
    closing = threading.Thread(target=batcher.close, args=(drain, None if drain else 60))
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
    batcher.close(drain=True, timeout=0.0)
    with pytest.raises(Stopping):
        client.result()


def held_in_memory():
    gc.collect()
    return sorted(type(thing).__name__ for thing in gc.get_objects() if type(thing) in (KVCache, Sequence))


def test_after_hundreds_of_jobs_no_cache_and_no_row_is_left(inplace):
    before = held_in_memory()  # what the logs of failures before this test hold
    inputs = [question(inplace, number) for number in range(3)]
    with Batcher(inplace, max_queue=300) as batcher:
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


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": True}, {"max_cache_mb": 0}])
def test_bounds_that_make_no_sense_are_refused(inplace, options):
    with pytest.raises(InvalidInput, match=next(iter(options))):
        Batcher(inplace, **options)
