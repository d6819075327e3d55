"""A row of a KV cache that tests drive step by step."""

import numpy as np

from hawk_trt import ModelInputs
from hawk_trt.inputs.layout import collate
from hawk_trt.scheduler import Scheduler


def start(pipe, columns):
    """A row with so many columns, its prompt of four words prefilled; how to go on."""
    inputs = ModelInputs(np.arange(4))
    layout = pipe.processor.layout(inputs)
    heads = np.array(pipe.bundle.manifest.head_weights.values, np.float32)
    visual, _ = pipe.vision_cache.encode([(inputs, layout)])
    outputs = pipe.backend.prefill(collate([layout], [0], [None], heads), visual, columns, logits=False)
    tokens = outputs.step.next_token

    def step(number):
        return pipe.backend.decode(outputs.rows, tokens, np.array([layout.next_position + number]), logits=False)

    return outputs.rows[0], step


def answer(pipe, request):
    """A request that is alone in its batch."""
    (result,) = pipe.generate_batch([request])
    return result


def assert_alone(plain, result, request, tolerance):
    """A result is what the request gets alone."""
    expected = answer(plain, request)
    assert result.token_ids == expected.token_ids
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=tolerance)


def come_and_go(pipe, ask):
    """Three requests of unlike lengths, and one that takes the slot of the first to end: requests and results."""
    scheduler = Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend, room=64)
    requests = [ask(number, length) for number, length in enumerate((3, 12, 5, 8))]
    sequences = [scheduler.add(request) for request in requests[:3]]
    while not sequences[0].finished:
        scheduler.step()
    sequences.append(scheduler.add(requests[3]))
    while not scheduler.idle:
        scheduler.step()
    return [(request, sequence.result()) for request, sequence in zip(requests, sequences, strict=True)]


def add_in_turn(scheduler, requests):
    """Add requests one after another, three steps behind each: their sequences."""
    sequences = []
    for request in requests:
        sequences.append(scheduler.add(request))
        for _ in range(3):
            scheduler.step()
    return sequences


def outgrow(pipe, ask):
    """Three requests that come one after another, so that their rows move to larger caches: requests and results."""
    scheduler = Scheduler(pipe.bundle, pipe.processor, pipe.vision_cache, pipe.backend, room=64)
    requests = [ask(number, 8) for number in range(3)]
    sequences = add_in_turn(scheduler, requests)
    while not scheduler.idle:
        scheduler.step()
    return [(request, sequence.result()) for request, sequence in zip(requests, sequences, strict=True)]
