"""Cosmos 3: its reasoner is exported as the Qwen3-VL that it is, whatever its checkpoint holds beside it."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.__main__ import main as export
from export.architectures import family_name
from hawk_trt import Pipeline
from hawk_trt.errors import CheckpointError
from qwen import QWENS, run
from random_models import IM_END_OPTION, prompt

ATTENTION = ((r"\.([qkv])_proj\.", r".to_\1."), (r"\.o_proj\.", ".to_out."), (r"\.([qk])_norm\.", r".norm_\1."))
GENERATOR = (
    *("layers.0.self_attn.add_q_proj.weight", "layers.0.self_attn.to_add_out.weight", "norm_moe_gen.weight"),
    *("layers.0.self_attn.norm_added_k.weight", "layers.0.mlp_moe_gen.up_proj.weight", "proj_in.weight"),
    *("time_embedder.linear_1.weight", "audio_proj_out.bias", "action_modality_embed"),
)
OLD_GENERATOR = ("model.layers.0.self_attn.q_proj_moe_gen.weight", "llm2vae.weight", "sound2llm.bias", "vae2llm.bias")


def flat(name):
    """A tensor's name in the unified checkpoint, and the folder that it lies in."""
    name = name.removeprefix("model.")
    if name.startswith("visual."):
        return name.removeprefix("visual."), "vision_encoder"
    name = name.removeprefix("language_model.")
    if ".self_attn." in name:
        for pattern, replacement in ATTENTION:
            name = re.sub(pattern, replacement, name)
    return name, "transformer"


def write(folder, tensors, *, index):
    """Tensors by folder and name, with the generator's beside them."""
    for part, own in tensors.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(own, folder / part / "model.safetensors", {"format": "pt"})
    if index:
        places = {name: f"{part}/model.safetensors" for part, own in tensors.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.fixture(scope="module")
def qwen(random_qwen):
    return random_qwen("qwen3_vl")


@pytest.mark.parametrize("make", ["unified", "unified, no index", "first"])
def test_the_reasoner_answers_as_the_qwen3_vl_that_it_is(qwen, tmp_path, make):
    folder, plain = tmp_path / "cosmos", load_file(qwen.checkpoint / "model.safetensors")
    tensors = {"transformer": {}, "vision_encoder": {}}
    for name, values in plain.items():
        own, part = flat(name)
        if make == "first":  # flat towers with the attention's usual names
            own = name.replace("language_model.", "").replace("model.visual.", "")
            part = "."
        tensors.setdefault(part, {})[own] = values
    extra = dict.fromkeys(OLD_GENERATOR if make == "first" else GENERATOR, np.zeros((4, 4), np.float32))
    if make == "first":
        write(folder, {".": tensors["."] | extra}, index=False)
    else:
        tensors["transformer"] |= extra
        write(folder, tensors, index=make == "unified")
    config = json.loads((qwen.checkpoint / "config.json").read_text())
    config |= {"architectures": ["Cosmos3ForConditionalGeneration"], "model_type": "cosmos3_omni", "model": {}}
    (folder / "config.json").write_text(json.dumps(config))
    assert export([str(folder), "--out", str(tmp_path / "bundle"), "--target", "cpu", *IM_END_OPTION]) == 0
    inputs = prompt(QWENS["qwen3_vl"].patch_dim, **QWENS["qwen3_vl"].prompts["image and videos"])
    with (
        Pipeline.load(tmp_path / "bundle", threads=1) as pipe,
        Pipeline.load(qwen.bundle, target="cpu", threads=1) as plain_pipe,
    ):
        assert pipe.bundle.manifest.family == "qwen3_vl"
        got, expected = run(pipe, inputs, 0.3), run(plain_pipe, inputs, 0.3)
    np.testing.assert_array_equal(got.logits, expected.logits)
    np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)


def test_cosmos3_edge_is_refused_with_what_to_take_instead():
    with pytest.raises(CheckpointError, match=r"SigLIP2's; take Cosmos-Reason2 or Cosmos3-Nano"):
        family_name({"architectures": ["Cosmos3EdgeForConditionalGeneration"]})
