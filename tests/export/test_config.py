"""config.json of every generation of Qwen2.5-VL checkpoint, and what is refused."""

import copy
import json
from pathlib import Path

import msgspec
import pytest
from transformers import Qwen2_5_VLConfig

import golden
from export.architectures import family_name, read_config
from hawk_trt.errors import CheckpointError
from hawk_trt.models import load_family
from hawk_trt.models.qwen2_5_vl import Qwen25VL
from hawk_trt.models.vision_config import AnyVision

TINY = Path(__file__).parents[2] / "examples" / "tiny-vlm"

# As the hub's Qwen2.5-VL-7B-Instruct has it: text sizes at the top level, in_chans, type mrope.
HUB = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def hub(**changes):
    return copy.deepcopy(HUB) | changes


def hub_vision(**changes):
    config = hub()
    config["vision_config"] |= changes
    return config


def test_the_hub_config_gives_the_7b_sizes():
    language = read_config(HUB).language
    assert (language.hidden_size, language.head_dim, language.num_attention_heads) == (3584, 128, 28)
    assert (language.num_key_value_heads, language.num_hidden_layers, language.vocab_size) == (4, 28, 152064)
    assert language.mrope_section == (16, 24, 24)
    assert language.rope_theta == 1e6
    assert language.max_position_embeddings == 128000
    assert not language.tie_word_embeddings
    vision = read_config(HUB).vision
    assert (vision.depth, vision.hidden_size, vision.in_channels) == (32, 1280, 3)
    assert vision.fullatt_block_indexes == (7, 15, 23, 31)
    assert vision.tokens_per_second == 2
    assert vision.rope_theta == 10000.0


@pytest.mark.parametrize("source", ["hub", "4.52", "5.x"])
def test_every_generation_of_the_file_gives_the_sizes_that_transformers_reads(source):
    folder = {"4.52": golden.MODEL, "5.x": TINY}.get(source)
    config = HUB if folder is None else json.loads((folder / "config.json").read_text())
    theirs = Qwen2_5_VLConfig(**copy.deepcopy(config))
    model = read_config(config)
    language, vision = model.language, model.vision
    text = theirs.text_config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(language, name) == getattr(text, name), name
    assert language.num_key_value_heads == text.num_key_value_heads
    assert language.rms_norm_eps == text.rms_norm_eps
    assert language.rope_theta == text.rope_parameters["rope_theta"]
    assert list(language.mrope_section) == text.rope_parameters["mrope_section"]
    assert language.tie_word_embeddings == theirs.tie_word_embeddings
    for name in ("depth", "hidden_size", "num_heads", "patch_size", "window_size", "tokens_per_second", "in_channels"):
        assert getattr(vision, name) == getattr(theirs.vision_config, name), name
    assert list(vision.fullatt_block_indexes) == list(theirs.vision_config.fullatt_block_indexes)


def test_a_config_saved_again_by_transformers_reads_the_same(tmp_path):
    Qwen2_5_VLConfig(**hub()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in saved
    assert read_config(saved).language == read_config(HUB).language
    assert read_config(saved).vision == read_config(HUB).vision


def test_a_config_that_transformers_4_49_saved_without_its_own_defaults_reads_the_same():
    config = hub(vision_config={"hidden_size": 1280, "in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2})
    assert read_config(config).vision == read_config(HUB).vision


def test_text_config_wins_where_it_holds_the_key():
    config = hub_vision(out_hidden_size=1792) | {
        "text_config": {"hidden_size": 1792, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": None}
    }
    language = read_config(config).language
    assert (language.hidden_size, language.num_attention_heads) == (1792, 14)
    assert language.rms_norm_eps == 1e-6  # null says nothing


_SECTION = {"mrope_section": [16, 24, 24]}
_OTHER = {"mrope_section": [8, 28, 28]}


@pytest.mark.parametrize(
    ("top", "text"),
    [
        ({}, {"rope_scaling": {"type": "mrope", **_OTHER, "rope_theta": 5e5}}),
        ({}, {"rope_scaling": {"type": "mrope", **_OTHER}, "rope_theta": 7e5}),
        ({}, {"rope_scaling": None, "rope_theta": 7e5}),
        ({"rope_scaling": {"type": "mrope", **_OTHER}, "rope_theta": 5e5}, {}),
        ({"rope_parameters": {**_OTHER, "rope_theta": 5e5}}, {"rope_parameters": None, "rope_theta": 7e5}),
    ],
)
@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
def test_rotary_settings_in_several_places_count_as_in_transformers(top, text):
    sizes = {key: value for key, value in HUB.items() if key not in ("vision_config", "rope_scaling", "rope_theta")}
    theirs = {"rope_parameters": {**_SECTION, "rope_theta": 3e5, "rope_type": "default"}} | text
    if theirs["rope_parameters"] is None:
        theirs |= {"rope_scaling": {"type": "mrope", **_SECTION}}
    config = {**sizes, "vision_config": HUB["vision_config"], **top, "text_config": {**sizes, **theirs}}
    expected = Qwen2_5_VLConfig(**copy.deepcopy(config)).text_config.rope_parameters
    language = read_config(config).language
    assert (language.rope_theta, list(language.mrope_section)) == (expected["rope_theta"], expected["mrope_section"])


def test_scaling_that_is_added_to_a_newer_config_is_not_overlooked():
    config = {**HUB, "rope_parameters": {**_SECTION, "rope_theta": 1e6}, "rope_scaling": {"type": "yarn", **_SECTION}}
    with pytest.raises(CheckpointError, match=r"rope_scaling\.rope_type: got 'yarn'"):
        read_config(config)


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_tied_embeddings_are_found_in_either_place(place):
    tied = {"tie_word_embeddings": True}
    assert read_config(hub(**(tied if place == "top" else {"text_config": tied}))).language.tie_word_embeddings


def test_vision_sizes_survive_the_manifest():
    vision = read_config(HUB).vision
    assert msgspec.json.decode(msgspec.json.encode(vision), type=AnyVision) == vision


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
        ({"use_sliding_window": True, "max_window_layers": 20}, ("use_sliding_window", "layer 20")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "sliding_attention")),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, ("rope_scaling.rope_type", "'yarn'")),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, ("mrope_section", "23", "64")),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [32, 32]}}, ("mrope_section", "three")),
        ({"rope_scaling": None}, ("mrope_section", "nothing")),
        ({"rope_theta": None}, ("rope_theta", "nothing")),
        ({"num_attention_heads": 27}, ("num_attention_heads", "27", "3584")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3", "28")),
        ({"head_dim": 64}, ("head_dim", "64", "128")),
        ({"hidden_size": "big"}, ("hidden_size", "'big'", "integer")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "1 to 1000")),
        ({"hidden_size": 2**31}, ("hidden_size", "1 to 1073741824")),
        ({"max_position_embeddings": 2**60}, ("max_position_embeddings", "1 to")),
        ({"rms_norm_eps": float("inf")}, ("rms_norm_eps", "inf", "below 1e+30")),
        ({"rms_norm_eps": 1e-60}, ("rms_norm_eps", "1e-60", "above 0 in float32")),
        ({"rms_norm_eps": 0}, ("rms_norm_eps", "0", "above 0")),
        ({"vocab_size": None}, ("vocab_size", "nothing")),
    ],
)
def test_language_settings_that_the_graphs_cannot_compute_are_refused_by_name(changes, words):
    with pytest.raises(CheckpointError) as error:
        read_config(hub(**changes))
    assert all(word in str(error.value) for word in ("config.json", *words))


def test_a_sliding_window_beyond_the_last_layer_is_no_sliding_window():
    read_config(hub(use_sliding_window=True, max_window_layers=28))
    read_config(hub(layer_types=["full_attention"] * 28))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings"])
def test_a_missing_language_size_is_named(key):
    config = hub()
    del config[key]
    with pytest.raises(CheckpointError, match=f"{key}: got nothing"):
        read_config(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, ("vision_config.hidden_act", "quick_gelu", "silu")),
        ({"num_heads": 15}, ("vision_config.num_heads", "15", "1280")),
        ({"in_chans": 1}, ("vision_config.in_chans", "1", "3")),
        ({"in_chans": None}, ("vision_config.in_chans", "nothing")),
        ({"window_size": 14}, ("vision_config.window_size", "14")),
        ({"out_hidden_size": 2048}, ("vision_config.out_hidden_size", "2048", "3584")),
        ({"fullatt_block_indexes": [7, 32]}, ("vision_config.fullatt_block_indexes", "32")),
        ({"fullatt_block_indexes": None}, ("vision_config.fullatt_block_indexes", "nothing")),
        ({"patch_size": [14, 14]}, ("vision_config.patch_size", "[14, 14]", "integer")),
        ({"tokens_per_second": None}, ("vision_config.tokens_per_second", "nothing")),
        ({"rope_parameters": {"rope_theta": ["1e4"]}}, ("vision_config.rope_parameters.rope_theta", "above 0")),
        ({"rope_parameters": {"rope_type": "linear"}}, ("vision_config.rope_parameters", "linear", "axial")),
    ],
)
def test_vision_settings_that_the_graph_cannot_compute_are_refused_by_name(changes, words):
    with pytest.raises(CheckpointError) as error:
        read_config(hub_vision(**changes))
    assert all(word in str(error.value) for word in words)


def test_a_config_without_a_vision_tower_is_refused():
    config = hub()
    del config["vision_config"]
    with pytest.raises(CheckpointError, match="vision_config"):
        read_config(config)


def test_special_tokens_come_from_the_config_then_from_the_tokenizer():
    added = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|endoftext|>": 151643, "<|vision_end|>": 7}
    tokens = read_config(HUB, {"eos_token_id": [151645, 151643], "pad_token_id": 151643}, added).special_tokens
    assert (tokens.image, tokens.video) == (151655, 151656)
    assert (tokens.vision_start, tokens.vision_end) == (151652, 151653)
    assert (tokens.im_start, tokens.im_end, tokens.pad) == (151644, 151645, 151643)
    assert tokens.eos == (151645, 151643)


def test_special_tokens_without_a_tokenizer_or_generation_config():
    config = json.loads((golden.MODEL / "config.json").read_text())
    tokens = read_config(config, {}, {}).special_tokens
    assert (tokens.image, tokens.video, tokens.vision_start, tokens.vision_end) == (505, 506, 502, 503)
    assert (tokens.im_start, tokens.im_end, tokens.pad, tokens.eos) == (None, None, 499, ())


def test_special_tokens_fall_back_to_text_config_and_added_tokens():
    config = hub(text_config={"eos_token_id": 3, "vision_end_token_id": 5})
    del config["eos_token_id"], config["vision_end_token_id"], config["image_token_id"]
    tokens = read_config(config, {}, {"<|image_pad|>": 9, "<|endoftext|>": 11}).special_tokens
    assert (tokens.eos, tokens.vision_end, tokens.image, tokens.pad) == ((3,), 5, 9, 11)


@pytest.mark.parametrize("value", [152064, -1, "a", True])
def test_a_token_id_outside_the_vocabulary_is_refused(value):
    with pytest.raises(CheckpointError, match=r"^generation_config\.json: eos_token_id.*152064"):
        read_config(HUB, {"eos_token_id": [value]}, {})
    with pytest.raises(CheckpointError, match=r"^config\.json: eos_token_id.*152064"):
        read_config(hub(eos_token_id=value), {"eos_token_id": 3}, {})
    config = hub()
    del config["image_token_id"]
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: image_token_id.*152064"):
        read_config(config, {}, {"<|image_pad|>": 200_000})


def test_the_family_is_found_by_architecture_and_by_sizes():
    assert family_name(HUB) == "qwen2_5_vl"
    assert type(load_family(read_config(HUB).vision)) is Qwen25VL
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        family_name({"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("named", [None, [], ["MyQwen2_5_VLForSFT"], ["PeftModel", "Qwen2_5_VLModel"]])
def test_the_model_type_counts_where_no_architecture_is_known(named):
    assert family_name({"architectures": named, "model_type": "qwen2_5_vl"}) == "qwen2_5_vl"
    assert family_name({"architectures": named, "model_type": "cosmos3_omni"}) == "qwen3_vl"
    with pytest.raises(CheckpointError, match="architecture: got"):
        family_name({"architectures": named, "model_type": "qwen3_vl_moe"})
