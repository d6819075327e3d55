"""Questions for a batcher on the tiny model."""

import threading

from examples.tiny_task import generate
from hawk_trt import PruningConfig
from served import Heard, ask

SAMPLES = list(generate(11, 6))
KEPT = PruningConfig(0.2)
LONG = 150


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
