"""The tiny trained model: its answers through the bundle against transformers and the PyTorch reference.

Fresh pictures of its task: 224 px, aligned, 10 to 16 glyphs, the five kinds of question alike.
"""

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig
from targets import ON_CPU

SEED = 2026
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return torch, model.eval()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, tiny_bundle):
    pytest.importorskip("torch")
    from hawk_trt.apps.parity.reference import Reference

    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        weights = pipe.bundle.manifest.head_weights.values
    return Reference.load(tiny_checkpoint, head_weights=weights, normalization="l2")


def unpruned_tokens(transformers_model, inputs, special):
    """transformers' own greedy generation."""
    torch, model = transformers_model
    ids = torch.tensor(inputs.input_ids)[None]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == special.image).int(),
            pixel_values=torch.tensor(inputs.pixel_values),
            image_grid_thw=torch.tensor(inputs.image_grid_thw),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
    return out[0, ids.shape[1] :].tolist()


def check_answers(pipe, transformers_model, reference, samples):
    """Unpruned tokens and pruned choices of every sample; the share of right pruned answers."""
    from hawk_trt.apps.parity.prompt_rules import prompt_tokens

    special, tokens = pipe.bundle.manifest.special_tokens, prompt_tokens(pipe.bundle)
    pruning = PruningConfig(keep_ratio=0.1)
    right = 0
    for sample in samples:
        inputs = pipe.prepare(sample.question, [sample.image])
        whole = pipe.generate(inputs, pruning=PruningConfig(keep_ratio=1.0), max_new_tokens=MAX_NEW_TOKENS)
        assert whole.token_ids == unpruned_tokens(transformers_model, inputs, special), sample.question
        pruned = pipe.generate(inputs, pruning=pruning, max_new_tokens=MAX_NEW_TOKENS)
        expected = reference.run(reference.embed(inputs, tokens), pruning, steps=len(pruned.token_ids))
        np.testing.assert_array_equal(pruned.kept_indices, expected.kept_indices)
        np.testing.assert_allclose(pruned.scores, expected.scores, rtol=0, atol=1e-5)
        assert pruned.token_ids == list(expected.tokens), sample.question
        right += pruned.text == sample.answer
    return right / len(samples)


def test_a_hundred_questions_unpruned_and_at_a_tenth_of_the_tokens(tiny_bundle, transformers_model, reference):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        assert check_answers(pipe, transformers_model, reference, list(generate(SEED, 100))) >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize("target", ON_CPU)
def test_a_thousand_questions_unpruned_and_at_a_tenth_of_the_tokens(tiny_bundle, transformers_model, reference, target):
    with Pipeline.load(tiny_bundle, target=target, threads=1) as pipe:
        assert check_answers(pipe, transformers_model, reference, list(generate(SEED + 1, 1000))) >= 0.90
