"""Requests share decode steps: each has a slot of the one KV cache, and its answer is the one that it has alone."""

import threading
from collections import Counter

import numpy as np
import pytest

from examples.tiny_task import generate
from generations import add_in_turn
from hawk_trt import Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import collate
from hawk_trt.scheduler import Scheduler
from served import Heard, alone, ask, assert_same, assert_served_as_alone
from trt_machine import engine_folder

pytestmark = pytest.mark.usefixtures("machines")
SAMPLES = list(generate(15, 8))
KEPT = PruningConfig(0.2)
PRUNINGS = (KEPT, PruningConfig(1.0), PruningConfig(0.5, quota="per-image"), PruningConfig(0.4, keep_mass=0.5))


@pytest.fixture(scope="module")
def folders(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    engines = {batch: engine_folder(tiny_bundle, out / str(batch), "tensorrt", batch=batch) for batch in (1, 4, 8)}
    return engines | {"portable": engine_folder(tiny_bundle, out / "portable", "portable", batch=4)}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    with Pipeline.load(tiny_bundle, target="cpu", threads=1) as pipe:
        yield pipe


def load(folder):
    return Pipeline.load(folder)


def job(pipe, number, tokens=12, pruning=KEPT, **options):
    """One image, none, or two."""
    sample = SAMPLES[number % len(SAMPLES)]
    images = ([sample.image], [], [sample.image[:112], SAMPLES[0].image])[number % 3]
    return ask(pipe.prepare(sample.question, images), pruning, tokens, ignore_eos=True, return_logits=True, **options)


def unlike_jobs(pipe, count=8):
    """Of unlike length, answer and pruning, some sampled."""
    return [
        job(
            pipe,
            number,
            3 + 7 * (number % 5),
            PRUNINGS[number % len(PRUNINGS)],
            sampling=SamplingConfig(temperature=8.0 * (number % 2), top_p=0.9, seed=number),
        )
        for number in range(count)
    ]


def scheduler_of(pipe):
    return Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend, room=64)


def free_slots(pipe):
    return [slot for slot in range(pipe.backend.max_batch) if slot not in pipe.backend.cache.owners]


def finish(scheduler):
    while not scheduler.idle:
        scheduler.step()


def assert_answers(sequence, expected):
    assert sequence.error is None
    got = sequence.result()
    assert got.token_ids == expected.token_ids
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [4, 8, "portable"])
def test_eight_clients_of_unlike_requests_hear_what_each_hears_alone(folders, bundle, kind):
    with load(folders[kind]) as pipe, Batcher(pipe) as batcher:
        jobs = unlike_jobs(pipe)
        assert_served_as_alone(bundle, batcher, jobs)  # ONNX Runtime, one by one
        expected = [alone(pipe, one) for one in jobs]
        heard = [Heard() for _ in jobs]
        clients = [
            threading.Thread(target=batcher.submit, args=(one, client)) for one, client in zip(jobs, heard, strict=True)
        ]
        for thread in clients:
            thread.start()
        for client, result in zip(heard, expected, strict=True):
            assert_same(client, result)  # the same engines, one by one
        assert free_slots(pipe) == list(range(pipe.backend.max_batch))


@pytest.mark.parametrize("kind", [4, "portable"])
def test_rows_join_and_leave_running_steps_in_the_lowest_free_slots(folders, kind, bundle):
    with load(folders[kind]) as pipe:
        scheduler = scheduler_of(pipe)
        jobs = [job(pipe, number, tokens) for number, tokens in enumerate((30, 8, 30, 12, 9, 20, 5))]
        sequences, shared, holes = add_in_turn(scheduler, jobs), Counter(), 0
        while not scheduler.idle:
            scheduler.step()
            if scheduler.running:
                slots = [s.row.slot for s in scheduler.running]
                assert len(set(slots)) == len(slots)
                shared[len(slots)] += 1
                holes += max(slots) + 1 > len(slots)
        for sequence, one in zip(sequences, jobs, strict=True):
            assert_answers(sequence, alone(bundle, one))
        assert max(shared) == 4
        assert holes, "no step ran over an idle slot between others"
        assert scheduler.num_rows > 1.5 * scheduler.num_steps


def test_gather_copies_nothing_and_each_row_writes_where_it_is(folders, bundle, machines):
    with load(folders[4]) as pipe:
        scheduler = scheduler_of(pipe)
        sequences = [scheduler.add(job(pipe, number, 20)) for number in range(3)]
        while len(scheduler.running) < 3:
            scheduler.step()
        before = Counter(machines.driver.calls)
        scheduler.running.reverse()
        pipe.backend.gather([sequence.row for sequence in scheduler.running], 320, 320)
        assert machines.driver.calls == before
        with pytest.raises(BackendError, match="rows: got some of another backend"):
            pipe.backend.gather([scheduler.running[0].row, object()], 320, 320)
        ends = sorted(pipe.backend.cache.ends[:3])
        assert len(set(ends)) > 1, "the rows are of unlike length"
        finish(scheduler)
        for number, sequence in enumerate(sequences):
            assert_answers(sequence, alone(bundle, job(pipe, number, 20)))


@pytest.mark.parametrize("kind", [4, "portable"])
def test_streams_that_take_turns_leave_the_columns_of_one_another_alone(folders, kind, bundle):
    with load(folders[kind]) as pipe:
        schedulers = [scheduler_of(pipe) for _ in range(3)]
        sequences = [scheduler.add(job(pipe, number, 8)) for number, scheduler in enumerate(schedulers)]
        while not all(scheduler.idle for scheduler in schedulers):
            for scheduler in schedulers:
                scheduler.step()
        for number, sequence in enumerate(sequences):
            assert_answers(sequence, alone(bundle, job(pipe, number, 8)))


def test_scores_for_a_quota_leave_the_slots_in_use_alone(folders, machines):
    with load(folders[4]) as pipe:
        inputs = [pipe.prepare(s.question, [s.image]) for s in SAMPLES[:4]]
        layouts = [pipe.processor.layout(one) for one in inputs]
        scheduler = scheduler_of(pipe)
        for number in range(4):
            scheduler.add(job(pipe, number, 30))
        while len(scheduler.running) < 4:
            scheduler.step()
        assert free_slots(pipe) == []
        visual = pipe.vision_cache.encode(list(zip(inputs, layouts, strict=True)))[0]
        cache = pipe.backend.cache
        start = min(cache.addresses().values())
        # another value than the first token's, which all prompts have in common
        content = machines.driver.block(start, cache.nbytes).view(start, cache.nbytes)
        content[:] = 0x3F
        scores = pipe.backend.score(collate(layouts, [5] * 4, [None] * 4, np.ones(8, np.float32)), visual)
        assert scores.shape[0] == 4
        assert (content == 0x3F).all()
        assert free_slots(pipe) == []


def test_a_cancelled_request_frees_its_slot_and_the_next_takes_it(folders, bundle):
    with load(folders[4]) as pipe:
        scheduler = scheduler_of(pipe)
        sequences = [scheduler.add(job(pipe, number, 40)) for number in range(5)]
        while len(scheduler.running) < 4:
            scheduler.step()
        scheduler.step()  # of all together
        leaving = sequences[1]
        slot = leaving.row.slot
        assert free_slots(pipe) == []
        scheduler.drop(leaving)
        while sequences[4].row is None:
            scheduler.step()
        assert sequences[4].row.slot == slot
        finish(scheduler)
        for number in (0, 2, 3, 4):
            assert_answers(sequences[number], alone(bundle, job(pipe, number, 40)))
        assert free_slots(pipe) == [0, 1, 2, 3]


def test_a_step_that_fails_frees_all_slots_and_the_next_requests_are_answered(folders, bundle, monkeypatch):
    import tensorrt_standin

    with load(folders[4]) as pipe:
        scheduler = scheduler_of(pipe)
        for profile, running in ((1, 4), (0, 0)):  # a decode step, a prefill
            sequences = [scheduler.add(job(pipe, number, 30)) for number in range(4)]
            while len(scheduler.running) < running:
                scheduler.step()
            with monkeypatch.context() as patch:
                run = tensorrt_standin.Context._ready

                def refuse(context, stream, profile=profile, run=run):
                    if context.profile == profile and context.engine.told["stage"] == "decoder":
                        raise tensorrt_standin.Refused("enqueueV3: no memory for tactic 0x2a")
                    return run(context, stream)

                patch.setattr(tensorrt_standin.Context, "_ready", refuse)
                finish(scheduler)
            assert all("tactic 0x2a" in str(sequence.error) for sequence in sequences)
            assert free_slots(pipe) == [0, 1, 2, 3]
            fresh = [scheduler.add(job(pipe, number)) for number in range(4)]
            finish(scheduler)
            for number, sequence in enumerate(fresh):
                assert_answers(sequence, alone(bundle, job(pipe, number)))


@pytest.mark.parametrize("kind", [4, "portable"])
def test_numbers_that_are_not_finite_end_their_row_alone_and_its_slot_is_clean_afterwards(
    folders, kind, bundle, machines
):
    with load(folders[kind]) as pipe:
        scheduler, cache = scheduler_of(pipe), pipe.backend.cache
        sequences = [scheduler.add(job(pipe, number, 24)) for number in range(4)]
        while len(scheduler.running) < 4:
            scheduler.step()
        scheduler.step()  # of all together
        bad = sequences[1]
        slot = bad.row.slot
        start = cache.addresses()["past_key.2"] + slot * cache.row_bytes
        # every column, those beyond its end too
        machines.driver.block(start, cache.row_bytes).view(start, cache.row_bytes)[:] = 0xFF
        while bad.error is None:
            scheduler.step()
        assert "decoder, layer 2" in str(bad.error)
        assert free_slots(pipe) == [slot]
        for _ in range(3):  # the others decode beside it, over the idle slot too
            scheduler.step()
        follower = scheduler.add(job(pipe, 5, 24))
        finish(scheduler)
        for number, sequence in ((0, sequences[0]), (2, sequences[2]), (3, sequences[3]), (5, follower)):
            assert_answers(sequence, alone(bundle, job(pipe, number, 24)))
        for name, address in cache.addresses().items():
            if not name.startswith("past"):
                continue
            row = machines.driver.block(address + slot * cache.row_bytes, cache.row_bytes)
            values = row.view(address + slot * cache.row_bytes, cache.row_bytes).view(np.float32)
            assert np.isfinite(values).all(), name


def test_a_slot_whose_numbers_nobody_saw_is_zeroed_for_the_next(folders, machines):
    with load(folders[4]) as pipe:
        sample = SAMPLES[0]
        for seen, zeroed in ((True, 1), (True, 1), (False, 1), (False, 2), (True, 3), (True, 3)):
            pipe.generate(sample.question, [sample.image], max_new_tokens=4, ignore_eos=True, return_logits=seen)
            assert machines.driver.enqueued["memset"] == zeroed
        assert machines.driver.calls["cuMemsetD2D8Async"] == 2, "one call clears a slot in all layers"


def test_prompts_that_would_share_a_prefill_wait_for_neighbouring_slots_or_run_alone(folders, bundle):
    with load(folders[4]) as pipe:
        scheduler = scheduler_of(pipe)
        stays = [scheduler.add(job(pipe, 3 * number, 40)) for number in range(4)]
        while len(scheduler.running) < 4:
            scheduler.step()
        scheduler.drop(stays[0])
        scheduler.drop(stays[2])
        scheduler._leave()
        assert free_slots(pipe) == [0, 2]
        assert pipe.backend.max_start == 1
        joining = [scheduler.add(job(pipe, 0, 6)) for _ in range(2)]
        prefills = scheduler.num_prefills
        finish(scheduler)
        assert scheduler.num_prefills == prefills + 2
        for number, sequence in ((3, stays[1]), (9, stays[3])):
            assert_answers(sequence, alone(bundle, job(pipe, number, 40)))
        for sequence in joining:
            assert_answers(sequence, alone(bundle, job(pipe, 0, 6)))


def test_prompts_padded_to_each_other_do_not_share_a_prefill_beyond_the_context(tiny_bundle, tmp_path, bundle):
    folder = engine_folder(
        tiny_bundle,
        tmp_path / "engines",
        "tensorrt",
        max_visual_tokens=64,
        max_prompt_tokens=100,
        max_context=50,
        batch=2,
    )
    with load(folder) as pipe:
        long, short = (ask(pipe.prepare(text), KEPT, 64, ignore_eos=True) for text in ("Hello? Hello?", "Hello?"))
        got, expected = (side.generate_batch([long, short]) for side in (pipe, bundle))
        for one, other in zip(got, expected, strict=True):
            assert one.finish_reason == "length"
            assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert len(got[1].token_ids) > len(got[0].token_ids)


def test_more_prompts_than_slots_are_refused_with_the_option(folders):
    with load(folders[4]) as pipe, pytest.raises(BackendError, match=r"got 5 prompts .* built for 4.*larger --batch"):
        pipe.backend.cache.find(5)


@pytest.fixture
def captures(folders):
    """Graphs captured so far, after as many prompts together as asked for."""
    with load(folders[4]) as pipe:
        text = ask(pipe.prepare("Hello?"), KEPT, 5, ignore_eos=True)

        def run(rows):
            results = pipe.generate_batch([text] * rows)
            assert len({tuple(result.token_ids) for result in results}) == 1
            return pipe.backend.decode_step.captures

        yield run


def test_graphs_are_kept_for_the_shapes_last_used_and_made_once(machines, monkeypatch, request):
    from hawk_trt.runtime.tensorrt import decode

    monkeypatch.setattr(decode, "MAX_GRAPHS", 3)
    captures = request.getfixturevalue("captures")
    assert [captures(rows) for rows in (1, 2, 3, 1, 2, 3)] == [1, 2, 3, 3, 3, 3]
    assert machines.driver.enqueued["decoder 1"] == 3, "one plain enqueue for each"
    assert machines.driver.live()["executable"] == 3
    assert [captures(rows) for rows in (4, 3, 2, 1)] == [4, 4, 4, 5]  # 4 took the place of 1, then 1 that of 4
    assert machines.driver.live()["executable"] == 3


def test_each_graph_has_contexts_of_its_own_as_many_as_there_is_memory_for(captures, machines, monkeypatch):
    from tensorrt_standin import Context, Engine

    def contexts():
        return sum(isinstance(thing, Context) for thing in machines.trt.objects)

    loaded = contexts()
    assert captures(1) == 1
    assert contexts() == loaded
    assert captures(2) == 2
    assert contexts() == loaded + 2
    monkeypatch.setattr(Engine, "create_execution_context", lambda engine, _: engine.refuse("out of memory") or None)
    assert captures(3) == 3  # in place of 1
    assert [captures(rows) for rows in (2, 3, 1)] == [3, 3, 4]
    assert contexts() == loaded + 2
