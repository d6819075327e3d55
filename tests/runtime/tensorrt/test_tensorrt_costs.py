"""What a token and a prompt cost in calls and bytes, by the number of requests that share decode steps."""

from collections import Counter

import numpy as np
import pytest

import tensorrt_standin
from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.scheduler import Scheduler
from served import ask
from trt_machine import engine_folder

SAMPLES = list(generate(15, 8))
KEPT = PruningConfig(0.2)
RUN = tensorrt_standin.Context._run


@pytest.fixture(scope="module")
def engines(tiny_bundle, tmp_path_factory):
    return engine_folder(tiny_bundle, tmp_path_factory.mktemp("engines") / "8", "tensorrt", batch=8)


def costs(pipe, machines, clients):
    """What 24 requests cost, of which so many clients always have one under way.

    Returns:
        Calls of the driver and of TensorRT's contexts, and decode steps, each over tokens; bytes between host and
        GPU, and bytes copied or zeroed on the GPU, each over requests.
    """
    scheduler = Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend)
    driver, trt, tokens = machines.driver, machines.trt, 0
    for count in (8, 24):  # the first fills the vision cache and makes graphs
        before = sum(driver.calls.values()), len(trt.calls), trt.enqueues.count(("decoder", 1))
        moved, sequences = Counter(driver.moved), []
        while len(sequences) < count or not scheduler.idle:
            while len(sequences) < count and len(scheduler.running) + len(scheduler.waiting) < clients:
                number = len(sequences)
                inputs = pipe.prepare(SAMPLES[number % 8].question, [SAMPLES[number % 8].image])
                sequences.append(scheduler.add(ask(inputs, KEPT, 9 + 12 * (number % 5), ignore_eos=True)))
            scheduler.step()
        after = sum(driver.calls.values()), len(trt.calls), trt.enqueues.count(("decoder", 1))
        moved = driver.moved - moved
        assert not any(sequence.error for sequence in sequences), sequences[0].error
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return (
        *((end - begin) / tokens for begin, end in zip(before, after, strict=True)),
        (moved["copy in"] + moved["copy out"]) / 24,
        (moved["copy"] + moved["memset"]) / 24,
    )


def counted_alone(context, tensors, label):
    """A run whose values nobody looks at: decode steps and the decoder's prefill compute nothing."""
    if label not in (("first_layer", 1), ("decoder", 1), ("decoder", 0)):
        return RUN(context, tensors, label)
    for name, dtype, shape, address in tensors:
        if name in ("next_token", "logits"):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            context.driver.block(address, size).view(address, size)[:] = 0
    context.module.enqueues.append(label)
    return True


def test_what_a_token_and_a_prompt_cost_falls_with_the_rows(engines, machines, monkeypatch):
    """The table in docs/tensorrt.md, printed with -s."""
    from hawk_trt import scheduler

    monkeypatch.setattr(tensorrt_standin.Context, "_run", counted_alone)
    table = {}
    for joint in (scheduler._JOINT_TOKENS, 0):  # short prompts share a prefill; as if they were long, none does
        monkeypatch.setattr(scheduler, "_JOINT_TOKENS", joint)
        for clients in (1, 4, 8):
            with Pipeline.load(engines) as pipe:
                table[joint, clients] = costs(pipe, machines, clients)
            print(joint, clients, *(round(value, 3) for value in table[joint, clients]))
        driver, tensorrt, steps, between, inside = zip(*(table[joint, n] for n in (1, 4, 8)), strict=True)
        assert 0.9 < steps[0] < 1
        assert steps[1] < 0.3
        assert steps[2] < 0.2
        assert driver[0] > 1.5 * driver[1] > 1.5 * driver[2]
        assert tensorrt[2] <= tensorrt[1] <= tensorrt[0], "graphs are not made again and again"
        assert max(between) <= between[0]
        assert max(inside) <= 8 * 320 * 2 * 32 * 4, "one slot at most: 4 layers, keys and values"
