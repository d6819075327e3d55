"""Checkpoints that the quantising packages themselves wrote, of a small random Qwen3-VL (make check-quantisers).

Every matrix is held against what the package makes of it, bit by bit, and the answers against PyTorch with those
floats. docs/quantised.md names the versions.
"""

import copy
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest

from export.__main__ import main as export
from export.checkpoint import Checkpoint
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from hawk_trt.runtime import session as ort_session
from random_models import EOS, IM_END, IM_END_OPTION, IMAGE, TOKEN_IDS, VIDEO, VISION_END, VOCAB, prompt, save_random

pytestmark = [pytest.mark.quantisers, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

PATCH_DIM = 1536
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
GROUP = 32
TOKENS = PromptTokens(image=IMAGE, video=VIDEO, vision_end=VISION_END, im_start=None, im_end=IM_END)
SCHEMES = {
    "int4 groups": {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True},
    "int4 groups, zero points": {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    "int4 rows, zero points": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "int8 groups": {"num_bits": 8, "strategy": "group", "group_size": GROUP, "symmetric": True},
    "FP8_DYNAMIC": {},
    "FP8_BLOCK": {},
    "W8A8": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": EOS,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        **TOKEN_IDS,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    return save_random(model, tmp_path_factory.mktemp("quantisers") / "source", 1)


def matrices(state):
    """Names, without .weight, of the language model's matrices."""
    return [
        name[:-7] for name in state if ".layers." in name and name.endswith("_proj.weight") and "visual" not in name
    ]


def written(source, folder, parts, settings):
    """A checkpoint like the source, with parts in the place of matrices."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    for name in matrices(state):
        del state[f"{name}.weight"]
    save_file({**state, **parts}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(source, quantised, floats, tmp_path, monkeypatch):
    """Hold a quantised checkpoint against what its package makes of it: floats by name, without .weight."""
    checkpoint, exact = Checkpoint.open(quantised), {}
    assert len(floats) == 4 * 7
    for name, expected in floats.items():
        found = checkpoint.tensor(f"language_model.{name.split('language_model.')[1]}.weight").array()
        np.testing.assert_array_equal(found.astype(NUMPY[expected.dtype]).astype(np.float32), expected.float().numpy())
        exact[f"{name}.weight"] = torch.from_numpy(found)  # float32, so that no rounding lies between the two answers
    plain = shutil.copytree(source, tmp_path / "plain")
    state = load_file(quantised / "model.safetensors")
    rest = {name: tensor.float() for name, tensor in state.items() if name.rsplit(".", 1)[0] not in floats}
    save_file(rest | exact, plain / "model.safetensors", metadata={"format": "pt"})

    class FloatActivations(ort.SessionOptions):
        def __init__(self):
            super().__init__()
            self.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")

    monkeypatch.setattr(ort_session.ort, "SessionOptions", FloatActivations)
    from hawk_trt.apps.parity.reference import Reference

    reference = Reference.load(plain, head_weights=(0.25,) * 4, normalization="l2")
    out = tmp_path / "bundle"
    assert export([str(quantised), "--out", str(out), "--target", "cpu", "--no-reference", *IM_END_OPTION]) == 0
    with Pipeline.load(out) as pipe:
        for keep_ratio in (1.0, 0.3):
            inputs = prompt(PATCH_DIM, images=[(1, 8, 12)], seed=2)
            pruning = PruningConfig(keep_ratio=keep_ratio)
            result = pipe.generate(inputs, pruning=pruning, max_new_tokens=5, ignore_eos=True, return_logits=True)
            expected = reference.run(reference.embed(inputs, TOKENS), pruning, steps=5)
            np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
            np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
            assert result.token_ids == list(expected.tokens)
            np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_of_llm_compressor(source, tmp_path, monkeypatch, scheme):
    llmcompressor = pytest.importorskip("llmcompressor")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    how = {"scheme": scheme, "targets": "Linear"}
    if SCHEMES[scheme]:
        weights = QuantizationArgs(type="int", **SCHEMES[scheme])
        how = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(source)
    recipe = QuantizationModifier(ignore=["re:.*visual.*", "lm_head"], **how)
    llmcompressor.oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(tmp_path / "quantised", save_compressed=True)
    settings = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    state, floats = load_file(tmp_path / "quantised" / "model.safetensors"), {}
    for name in matrices(load_file(source / "model.safetensors")):
        parts = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
        floats[name] = compressor.decompress(parts, group)["weight"]
    check(source, tmp_path / "quantised", floats, tmp_path, monkeypatch)


def test_fp8_of_modelopt(source, tmp_path, monkeypatch):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    inputs = prompt(PATCH_DIM, images=[(1, 8, 12)])
    ids = torch.from_numpy(inputs.input_ids)[None]

    def calibrate(model):
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=torch.from_numpy(inputs.pixel_values).bfloat16(),
            image_grid_thw=torch.from_numpy(inputs.image_grid_thw),
        )

    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    settings = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    settings["quant_cfg"].append({"quantizer_name": "*visual*", "enable": False})
    mtq.quantize(model, settings, calibrate)
    export_hf_checkpoint(model, export_dir=str(tmp_path / "quantised"))
    state = load_file(tmp_path / "quantised" / "model.safetensors")
    floats = {
        name: state[f"{name}.weight"].float() * state[f"{name}.weight_scale"]
        for name in matrices(load_file(source / "model.safetensors"))
    }
    told = Checkpoint.open(tmp_path / "quantised").quantisation.told
    assert told.startswith("modelopt, 28 matrices FP8 with a scale, static")
    check(source, tmp_path / "quantised", floats, tmp_path, monkeypatch)


def grid(weight, *, symmetric):
    """Scales and zero points [groups, out] of a matrix [out, in], by rounding to the nearest."""
    blocks = weight.reshape(len(weight), -1, GROUP)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = (blocks.abs().amax(-1) / 7 if symmetric else (high - low) / 15).half().float()
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
    return scale, zero


def test_autoawq(source, tmp_path, monkeypatch):
    gemm = pytest.importorskip("awq.modules.linear.gemm")
    from awq.utils.packing_utils import dequantize_gemm

    state, parts, floats = load_file(source / "model.safetensors"), {}, {}
    for name in matrices(state):
        weight = state[f"{name}.weight"]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        scale, zero = grid(weight, symmetric=False)
        low, high = (limit.repeat_interleave(GROUP, 1) for limit in (-zero * scale, (15 - zero) * scale))
        linear.weight.data = weight.clamp(low, high)  # the package packs without looking
        layer = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        parts |= {f"{name}.{part}": getattr(layer, part).contiguous() for part in ("qweight", "qzeros", "scales")}
        floats[name] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    check(source, written(source, tmp_path / "quantised", parts, settings), floats, tmp_path, monkeypatch)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel(source, tmp_path, monkeypatch, symmetric, version, desc_act):
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    state, parts, floats = load_file(source / "model.safetensors"), {}, {}
    for name in matrices(state):
        weight = state[f"{name}.weight"]
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight.clone()
        order = torch.randperm(columns) if desc_act else torch.arange(columns)
        scale, zero = grid(weight[:, order], symmetric=symmetric)
        zero = zero.clamp(min=1)  # the first version stores them less one
        layer = qlinear.TorchLinear(
            bits=4,
            group_size=GROUP,
            sym=symmetric,
            desc_act=desc_act,
            in_features=columns,
            out_features=rows,
            bias=False,
        )
        layer.pack(linear, scale, zero, (order.argsort() // GROUP).int())
        layer.post_init()
        floats[name] = layer.dequantize_weight().T.contiguous()
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=4, group_size=GROUP))
        names = ("qweight", "qzeros", "scales", "g_idx")
        parts |= {f"{name}.{part}": getattr(layer, part).contiguous() for part in names}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": symmetric, "checkpoint_format": version}
    check(source, written(source, tmp_path / "quantised", parts, settings), floats, tmp_path, monkeypatch)


def test_the_packages_are_those_that_the_documents_name():
    from importlib import metadata

    text = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")
    for package in ("compressed-tensors", "llmcompressor", "nvidia-modelopt", "autoawq", "gptqmodel"):
        assert f"{package} {metadata.version(package)}" in text
