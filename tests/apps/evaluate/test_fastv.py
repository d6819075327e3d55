"""FastV in PyTorch: what the evaluation compares with."""

from dataclasses import replace

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.errors import InvalidInput
from hawk_trt.runtime.trace import traced
from hybrid import HYBRID


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def fastv(tiny_checkpoint):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hawk_trt.apps.evaluate.fastv import FastV
    from hawk_trt.apps.parity.reference import Reference

    return FastV(Reference.load(tiny_checkpoint, head_weights=(), normalization="l2").model)


def ask_fastv(pipe, fastv, num_kept, steps=3):
    made = next(generate(4, 1))
    inputs = pipe.prepare(made.question, images=[made.image])
    layout = pipe.processor.layout(inputs)
    embeds = pipe.vision_cache.encode([(inputs, layout)])[0].numpy()
    return inputs, layout, embeds, fastv.answer(layout, embeds, num_kept, steps, ())


def test_fastv_that_keeps_all_answers_as_the_bundle(pipe, fastv):
    inputs, layout, _, answer = ask_fastv(pipe, fastv, 64)
    trace = traced(pipe, inputs, PruningConfig(keep_ratio=1.0), answer.token_ids[:-1])
    np.testing.assert_allclose(answer.logits, trace.logits, atol=1e-3)
    assert len(answer.kept) == layout.num_tokens


def test_fastv_drops_by_attention_of_its_second_layer_and_masks_them_from_the_third_on(pipe, fastv, tiny_checkpoint):
    """Against the whole model, with a mask in layers 2 and up instead of a gather."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, layout, embeds, answer = ask_fastv(pipe, fastv, 10, steps=1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    language = model.model.language_model
    visual = layout.visual_rows >= 0
    with torch.inference_mode():
        merged = language.embed_tokens(torch.tensor(layout.input_ids))
        merged[torch.tensor(visual)] = torch.tensor(embeds)
        given = {"inputs_embeds": merged[None], "position_ids": torch.tensor(layout.position_ids)[:, None]}
        attentions = language(**given, output_attentions=True).attentions
        phi = attentions[1][0, :, -1].mean(0).numpy()[visual]
        np.testing.assert_allclose(answer.phi, phi, atol=1e-6)
        kept = np.flatnonzero(visual)[np.argsort(-phi)[:10]]
        np.testing.assert_array_equal(answer.kept, np.sort([*np.flatnonzero(~visual), *kept]))

        dropped = torch.tensor(np.setdiff1d(np.flatnonzero(visual), kept))

        def blind(_module, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            mask[..., dropped] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        for layer in language.layers[2:]:
            layer.register_forward_pre_hook(blind, with_kwargs=True)
        logits = model.lm_head(language(**given).last_hidden_state[0, -1]).numpy()
    np.testing.assert_allclose(answer.logits[0], logits, atol=1e-4)


def test_a_hybrid_model_without_softmax_attention_in_layer_1_is_refused(pipe):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hawk_trt.apps.evaluate.fastv import check_layers

    check_layers(pipe.bundle.manifest)
    with pytest.raises(InvalidInput, match=r"selector fastv: layer 1 of .* is linear attention"):
        check_layers(replace(pipe.bundle.manifest, language=HYBRID))
