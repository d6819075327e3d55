"""What released checkpoints come with: quantised copies, sampling defaults, several stop tokens, head counts, tools.

With HAWK_REAL_CHECKPOINT the last tests run over a real one; `make real MODEL=...` does more.
"""

import json
import os
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from checkpoints import NEWER, TINY, config, make_checkpoint, write_json, write_raw_safetensors, write_safetensors
from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from hawk_trt.errors import InvalidInput
from random_models import prompt
from targets import ON_CPU

WEIGHT = "model.layers.0.mlp.down_proj"
# What quantisers write into config.json, and the tensor that tells on them where a config lost it.
QUANTISED = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "qweight", np.int32),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "g_idx", np.int32),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight.absmax", np.float32),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", np.float32),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "weight_packed", np.int32),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_its_method(tmp_path, capsys, method, nested):
    folder = make_checkpoint(tmp_path / "model")
    settings = {"quantization_config": QUANTISED[method][0]}
    changed = config(nested=nested)
    (changed["text_config"] if nested else changed).update(settings)
    write_json(folder / "config.json", changed)
    assert export([str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert method in error and len(error.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_tensors_are_refused_by_name_where_the_config_does_not_say_it(tmp_path, capsys, method):
    folder = make_checkpoint(tmp_path / "model")
    _, part, dtype = QUANTISED[method]
    write_safetensors(folder / "model.safetensors", {f"{WEIGHT}.{part}": np.zeros((4, 4), dtype)})
    assert export([str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{WEIGHT}.{part}" in error and "quantised" in error


def test_weights_of_eight_bits_are_refused_by_their_dtype(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "model")
    header = {f"{WEIGHT}.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
    write_raw_safetensors(folder / "model.safetensors", header, bytes(4))
    assert export([str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "float8_e4m3fn" in capsys.readouterr().err


def test_every_stop_token_of_generation_config_ends_an_answer(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    generation = json.loads((folder / "generation_config.json").read_text())
    image = tiny_checkpoint / "samples" / "0-colour.png"
    answers = {}
    for name, eos in (("one", [458]), ("two", None)):
        write_json(folder / "generation_config.json", generation | {"eos_token_id": eos or [458, answers["one"][0]]})
        assert export([str(folder), "--out", str(tmp_path / name), "--target", "cpu"]) == 0
        with Pipeline.load(tmp_path / name, threads=1) as pipe:
            result = pipe.generate("What colour is the heart?", images=[image], max_new_tokens=8)
            answers[name] = result.token_ids
            assert result.finish_reason == "stop"
    assert len(answers["one"]) > 1 and answers["two"] == answers["one"][:1]


def test_sampling_defaults_of_generation_config_change_nothing(tiny_checkpoint, tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    generation = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 2.0}
    write_json(folder / "generation_config.json", generation | sampling)
    assert export([str(folder), "--out", str(tmp_path / "bundle"), "--target", "cpu"]) == 0
    results = []
    for bundle in (tmp_path / "bundle", tiny_bundle):
        with Pipeline.load(bundle, target="cpu", threads=1) as pipe:
            image = tiny_checkpoint / "samples" / "0-colour.png"
            results.append(pipe.generate("What colour is the heart?", images=[image], max_new_tokens=8).token_ids)
    assert results[0] == results[1]


def test_tools_are_refused_where_the_template_would_leave_them_out(tiny_bundle):
    tools = [{"type": "function", "function": {"name": "look"}}]
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        with pytest.raises(InvalidInput, match="tools: got some, but the bundle's chat template takes none"):
            pipe.prepare("Look.", tools=tools)
        call = {"role": "assistant", "tool_calls": tools}
        with pytest.raises(InvalidInput, match="tool_calls: got some"):
            pipe.prepare([{"role": "user", "content": "Look."}, call, {"role": "user", "content": "Well?"}])
        told = pipe.prepare([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look."}])
        assert "Be brief." in pipe.processor.chat.tokenizer.decode(told.input_ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_key_head_for_all_and_one_for_each_equal_the_model_in_pytorch(tmp_path, kv_heads, target):
    pytest.importorskip("torch")
    from hawk_trt.apps.parity.reference import Reference

    sizes = replace(TINY, kv_heads=kv_heads)
    folder = make_checkpoint(tmp_path / "model", sizes=sizes, naming=NEWER)
    assert export([str(folder), "--out", str(tmp_path / "out"), "--im-end-token-id", "314"]) == 0
    reference = Reference.load(folder, head_weights=(0.1, 0.4, 0.3, 0.2), normalization="l2")
    tokens = PromptTokens(image=319, video=318, vision_end=316, im_start=None, im_end=314)
    inputs = prompt(1176, images=[(1, 8, 12)])
    pruning = PruningConfig(0.3, head_weights=(0.1, 0.4, 0.3, 0.2))
    expected = reference.run(reference.embed(inputs, tokens), pruning, steps=4)
    with Pipeline.load(tmp_path / "out", target=target, threads=1) as pipe:
        result = pipe.generate(inputs, pruning=pruning, max_new_tokens=4, ignore_eos=True, return_logits=True)
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    assert result.token_ids == list(expected.tokens)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


def test_a_bfloat16_checkpoint_without_a_head_bias_is_refused_by_the_tensor_it_lacks(tmp_path, capsys):
    from checkpoints import random_tensors

    tensors = {name: array for name, array in random_tensors(dtype="BF16").items() if "k_proj.bias" not in name}
    assert tensors["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert export([str(make_checkpoint(tmp_path / "model", tensors)), "--out", str(tmp_path / "out")]) == 1
    assert "no tensor language_model.layers.0.self_attn.k_proj.bias" in capsys.readouterr().err


@pytest.mark.real
def test_a_released_checkpoint_exports_and_answers(tmp_path):
    folder = os.environ["HAWK_REAL_CHECKPOINT"]
    assert export([folder, "--out", str(tmp_path / "bundle"), "--target", "cpu"]) == 0
    image = np.full((448, 448, 3), (200, 30, 30), np.uint8)
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
        result = pipe.generate("What colour is this picture? One word.", images=[image], max_new_tokens=8)
    assert result.num_kept < result.num_visual and "red" in result.text.lower()
