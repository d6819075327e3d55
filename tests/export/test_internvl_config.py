"""The config.json of InternVL3 and 3.5: real sizes in both makes, and what is refused by name."""

import copy
import math

import msgspec
import numpy as np
import pytest

from export.architectures import family_name, read_config
from export.graphs import inventory
from export.head_weights import default_head_weights
from export.tensors import internvl_names
from hawk_trt.errors import CheckpointError
from hawk_trt.stages import LanguageConfig
from internvl import RELEASED, RELEASED_35, original, original_35

TOKENS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
    "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667, "<video>": 151674,
}  # fmt: skip


def converted_35(size="8B"):
    """config.json of OpenGVLab/InternVL3_5-*-HF."""
    return {**converted(config=original_35(size)), "image_token_id": 151671}


def converted(size="8B", config=None):
    """config.json of OpenGVLab/InternVL3-*-hf."""
    config = config or original(size)
    text, vision = config["llm_config"], config["vision_config"]
    kept = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "norm_type")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {**text, "eos_token_id": 151645},
        "vision_config": {
            **{key: vision[key] for key in kept},
            "attention_bias": vision["qkv_bias"],
            "image_size": [448, 448],
            "model_type": "internvl_vision",
            "num_attention_heads": vision["num_attention_heads"],
            "num_channels": 3,
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": vision["qk_normalization"],
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_are_read_alike_in_both_makes(size):
    hidden, inner, layers, heads, kv_heads, billions = RELEASED[size]
    model = read_config(original(size))
    language, vision = model.language, model.vision
    assert (language, vision) == (
        read_config(converted(size)).language,
        read_config(converted(size)).vision,
    )
    assert (language.hidden_size, language.intermediate_size, language.num_hidden_layers) == (hidden, inner, layers)
    assert (language.num_attention_heads, language.num_key_value_heads) == (heads, kv_heads)
    assert (language.mrope_section, language.position_axes, language.rope_theta) == ((), 1, 1e6)
    assert language.max_position_embeddings == 32768 and not language.tie_word_embeddings
    assert vision.tokens_per_item(np.array([[13, 32, 32]])).tolist() == [13 * 256]
    assert (vision.min_tiles, vision.max_tiles, vision.use_thumbnail) == (1, 12, True)
    large = size in ("38B", "78B")
    assert (vision.norm, vision.qk_norm, vision.qkv_bias) == (
        ("rms_norm", True, False) if large else ("layer_norm", False, True)
    )
    parameters = sum(math.prod(shape) for shape in inventory(language, vision).values())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("size", RELEASED_35)
def test_the_sizes_of_internvl3_5_are_read_alike_in_both_makes(size):
    hidden, inner, layers, heads, kv_heads, billions = RELEASED_35[size]
    model, other = read_config(original_35(size)), read_config(converted_35(size))
    assert (model.language, model.vision) == (other.language, other.vision)
    assert model.language == LanguageConfig(
        hidden, inner, layers, heads, kv_heads, 128, 151936, 1e-6, 1e6, (), 40960, False, qk_norm=True
    )
    three = read_config(original("38B" if size == "38B" else "8B")).vision
    assert model.vision == msgspec.structs.replace(three, out_hidden_size=hidden)
    tensors = inventory(model.language, model.vision)
    parameters = sum(math.prod(shape) for shape in tensors.values())
    assert round(parameters / 1e9, 1) == billions
    assert size != "1B" or parameters == 1_060_897_792  # of the released file
    layer = "language_model.layers.0.self_attn"
    assert tensors[f"{layer}.q_norm.weight"] == tensors[f"{layer}.k_norm.weight"] == (128,)
    assert not any(name.startswith("language_model") and name.endswith(".bias") for name in tensors)
    assert default_head_weights("internvl", model.language).values == (1 / heads,) * heads


@pytest.mark.parametrize("make", [original_35, converted_35])
@pytest.mark.parametrize("size", ["1B", "38B"])
def test_the_tensors_of_internvl3_5_are_those_of_transformers(make, size):
    """With two language layers and one of vision; the shapes of the others are the same."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = converted_35(size)
    for section, layers in (("text_config", 2), ("vision_config", 1)):
        config[section]["num_hidden_layers"] = layers
    with torch.device("meta"):
        theirs = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig.from_dict(config))
    found = {internvl_names(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    given = make(size)
    for section, layers in (("llm_config", 2), ("text_config", 2), ("vision_config", 1)):
        if section in given:
            given[section]["num_hidden_layers"] = layers
    model = read_config(given)
    assert found == {(name,): shape for name, shape in inventory(model.language, model.vision).items()}


def test_both_makes_are_the_family_and_tell_its_tokens():
    for config in (original(), converted()):
        assert family_name(config) == "internvl"
        tokens = read_config(config, {}, TOKENS).special_tokens
        assert (tokens.image, tokens.vision_start, tokens.vision_end) == (151667, 151665, 151666)
        assert tokens.video == 151674  # beyond the vocabulary: it is in templates alone
        assert 151645 in tokens.eos  # <|im_end|>, which the original leaves to its code
    assert read_config(converted(), {}, {}).special_tokens.image == 151667


def test_head_weights_start_uniform_though_the_8b_has_as_many_heads_as_the_published_vector():
    for size in RELEASED:
        language = read_config(original(size)).language
        weights = default_head_weights("internvl", language)
        assert weights.values == (1 / language.num_attention_heads,) * language.num_attention_heads
        assert weights.source == "uniform (not calibrated)"


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("InternLM2ForCausalLM", "internlm2"),
        ("InternLM3ForCausalLM", "internlm3"),
        ("LlamaForCausalLM", "llama"),
        ("Phi3ForCausalLM", "phi3"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("GptOssForCausalLM", "gpt_oss"),
    ],
)
def test_other_language_sides_of_the_family_are_refused_by_name(architecture, model_type):
    config = original()
    config["llm_config"] |= {"architectures": [architecture], "model_type": model_type}
    with pytest.raises(CheckpointError, match=f"llm_config: got the language side {architecture}, expected Qwen2"):
        read_config(config)
    config = converted()
    config["text_config"] |= {"architectures": None, "model_type": model_type}
    with pytest.raises(CheckpointError, match=f"text_config: got the language side {model_type}, expected Qwen2"):
        read_config(config)


def test_a_config_that_says_two_language_sides_or_none_is_refused():
    for named, got in ((("Qwen2ForCausalLM", "qwen3"), "Qwen2ForCausalLM and qwen3"), ((None, None), "nothing")):
        config = original()
        config["llm_config"] |= {"architectures": named[0] and [named[0]], "model_type": named[1]}
        with pytest.raises(CheckpointError, match=f"got the language side {got}, expected Qwen2ForCausalLM"):
            read_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias: got True, expected False"),
        ({"head_dim": None}, "head_dim: got nothing, expected an integer"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: got 'yarn', expected default"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 8}, "use_sliding_window"),
    ],
)
@pytest.mark.parametrize(("make", "section"), [(original_35, "llm_config"), (converted_35, "text_config")])
def test_what_qwen3_may_say_and_the_graph_cannot_compute_is_refused_by_its_key(make, section, changes, message):
    config = make()
    config[section] |= changes
    with pytest.raises(CheckpointError, match=message):
        read_config(config)


def test_internvl3_5_flash_is_refused_with_what_to_take():
    config = {**original_35(), "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.5}
    with pytest.raises(
        CheckpointError, match=r"flash_relative_threshold: got 0.5, .* Take the InternVL3.5 of its size"
    ):
        read_config(config)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"ps_version": "v1"}, "ps_version: got 'v1', expected v2"),
        (None, {"select_layer": -2}, "select_layer: got -2, expected -1"),
        (None, {"downsample_ratio": 0.4}, "downsample_ratio: got 0.4"),
        (None, {"force_image_size": 224}, "force_image_size: got 224, expected 448"),
        (None, {"image_seq_length": 64}, "image_seq_length: got 64, expected 256"),
        (None, {"max_dynamic_patch": 0}, "max_dynamic_patch: got 0"),
        (None, {"vision_config": None}, "vision_config: got nothing"),
        (None, {"llm_config": None}, "text_config: got nothing"),
        ("vision_config", {"image_size": [448, 336]}, r"vision_config.image_size: got \[448, 336\]"),
        ("vision_config", {"image_size": 2**40}, "vision_config.image_size: got 1099511627776"),
        ("vision_config", {"norm_type": "batch_norm"}, "norm_type: got 'batch_norm', expected layer_norm or rms_norm"),
        ("vision_config", {"num_attention_heads": 15}, "num_attention_heads: got 15, expected a divisor of 1024"),
        ("vision_config", {"use_mean_pooling": False}, "use_mean_pooling: got False, expected True"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act: got 'silu', expected gelu"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused_by_its_key(section, changes, message):
    config = copy.deepcopy(original())
    (config if section is None else config[section]).update(changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(config)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_rope_scaling_that_changes_positions_within_the_context_is_refused(scaling):
    config = original()
    config["llm_config"]["rope_scaling"] = scaling
    with pytest.raises(CheckpointError, match=r"rope_type: got '(linear|yarn)', expected default or dynamic"):
        read_config(config)


def test_without_dynamic_tiling_an_image_is_one_tile():
    vision = read_config({**original(), "dynamic_image_size": False}).vision
    assert (vision.min_tiles, vision.max_tiles) == (1, 1)


def test_the_original_gets_a_template_and_the_converted_keeps_its_own():
    assert "<IMG_CONTEXT>" in read_config(original()).chat_template
    assert read_config(converted()).chat_template is None
    assert read_config({**original(), "template": "Hermes-2"}).chat_template is None
