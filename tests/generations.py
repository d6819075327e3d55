"""A row of a KV cache that tests drive step by step."""

import numpy as np

from hawk_trt import ModelInputs
from hawk_trt.inputs.layout import collate


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
