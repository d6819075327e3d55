"""A generation that tests drive step by step."""

import numpy as np

from hawk_trt import ModelInputs
from hawk_trt.inputs.layout import collate
from hawk_trt.runtime.protocol import DecodeInputs


def start(pipe, columns):
    """A generation of so many columns, its prompt of four words prefilled; how to go on."""
    inputs = ModelInputs(np.arange(4))
    layout = pipe.processor.layout(inputs)
    generation = pipe.backend.start(1, columns)
    heads = np.array(pipe.bundle.manifest.head_weights.values, np.float32)
    outputs = generation.prefill(
        collate([layout], [0], [None], heads), pipe.vision_cache.encode([(inputs, layout)])[0], logits=False
    )

    def step(number):
        inputs = DecodeInputs(outputs.step.next_token, np.array([layout.next_position + number]))
        return generation.decode(inputs, logits=False)

    return generation, step


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
