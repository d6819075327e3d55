"""Qwen2.5-VL 3B, 7B, 32B and 72B by their released config.json: sizes, weights and graphs, all weights holes."""

import json

import numpy as np
import onnx
import pytest

from checkpoints import QWEN_MODELS, Sizes, make_checkpoint, make_sparse_checkpoint, shapes, write_json
from export.__main__ import main as export
from export.architectures import read_config
from export.checkpoint import Checkpoint
from export.contract import decoder_entry, first_layer_entry
from export.graphs import build_graphs, inventory
from export.head_weights import UNIFORM, default_head_weights
from export.real_shapes import shape_config
from export.vision import GRAPHS
from export.weights import WeightStore
from hawk_trt.bundle import read_manifest
from hawk_trt.stages import CUDA, DECODER, FIRST_LAYER, PORTABLE, TENSORRT, VISION

# config.json of Qwen2.5-VL-3B-Instruct; those of the others differ in sizes alone.
RELEASED_3B = {
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
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
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
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
# Parameters that the model cards round to 3.75, 8.29, 33.5 and 73.4 billion.
PARAMETERS = {"3B": 3.755e9, "7B": 8.292e9, "32B": 33.453e9, "72B": 73.411e9}


def released(name):
    """RELEASED_3B with the sizes of another model."""
    sizes = QWEN_MODELS[name]
    vision = {"out_hidden_size": sizes.hidden_size, "intermediate_size": sizes.vision_intermediate_size}
    return RELEASED_3B | {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab_size,
        "tie_word_embeddings": name == "3B",
        "vision_config": RELEASED_3B["vision_config"] | vision,
    }


@pytest.fixture(scope="module", params=QWEN_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name, tmp_path_factory):
    """Sparse shards of the real shapes with the released config.json: no disk space."""
    folder = tmp_path_factory.mktemp("real") / name
    make_sparse_checkpoint(folder, QWEN_MODELS[name], tied=name == "3B", shards={"72B": 38}.get(name, 5))
    write_json(folder / "config.json", released(name))
    return folder


def test_the_released_config_gives_the_sizes_and_the_number_of_parameters(name):
    config, sizes = released(name), QWEN_MODELS[name]
    model = read_config(config)
    language, vision = model.language, model.vision
    assert (model.vision.family, language.head_dim, language.mrope_section) == ("qwen2_5_vl", 128, (16, 24, 24))
    assert (language.max_position_embeddings, language.tie_word_embeddings) == (128_000, name == "3B")
    assert inventory(language, vision) == shapes(sizes, tied=name == "3B")
    count = sum(int(np.prod(shape)) for shape in inventory(language, vision).values())
    assert count == pytest.approx(PARAMETERS[name], rel=2e-3)
    tokens = read_config(config, {"eos_token_id": [151645, 151643]}, {}).special_tokens
    assert (tokens.image, tokens.vision_end, tokens.eos) == (151655, 151653, (151645, 151643))


@pytest.mark.parametrize("target", (CUDA, TENSORRT, PORTABLE))
def test_every_weight_has_its_place_and_every_graph_its_contract(checkpoint, target):
    opened = Checkpoint.open(checkpoint)
    model = read_config(opened.config)
    language, vision = model.language, model.vision
    store = WeightStore(opened, "bfloat16", link=True)
    graphs = build_graphs(vision, language, store, "bfloat16", target, "l2")
    table = store.table((language.vocab_size, language.hidden_size))
    assert opened.unused() == []
    assert (table.dtype, table.shape) == ("bfloat16", (language.vocab_size, language.hidden_size))
    assert store.disk_bytes == 0
    assert store.total_bytes == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    specs = {
        VISION: GRAPHS[vision.family].entry(vision, "bfloat16", target),
        FIRST_LAYER: first_layer_entry(language, "bfloat16", target),
        DECODER: decoder_entry(language, "bfloat16", target),
    }
    for stage, spec in specs.items():
        graph = graphs[stage].model().graph
        assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
        assert [value.name for value in graph.output] == [tensor.name for tensor in spec.outputs]
        for tensor in graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                offset, length = int(where["offset"]), int(where["length"])
                assert offset + length <= (checkpoint / where["location"]).stat().st_size
                assert length == 2 * int(np.prod(tensor.dims))
    caches = [value.name for value in graphs[DECODER].model().graph.input if value.name.startswith("past_key")]
    assert len(caches) == language.num_hidden_layers - 1


def test_shapes_are_inferred_through_every_graph(checkpoint):
    opened = Checkpoint.open(checkpoint)
    model = read_config(opened.config)
    language, vision = model.language, model.vision
    graphs = build_graphs(vision, language, WeightStore(opened, "float32"), "float32", "cpu", "l2")
    for graph in graphs.values():
        onnx.shape_inference.infer_shapes(graph.model(), check_type=True, strict_mode=True, data_prop=True)


def test_the_released_head_weights_are_the_7bs_and_no_others(name):
    language = read_config(released(name)).language
    weights = default_head_weights("qwen2_5_vl", language)
    assert len(weights.values) == language.num_attention_heads
    if name == "7B":
        assert "2604.07812" in weights.source or "HAWK" in weights.source
        assert weights.values[1] == pytest.approx(0.3 / 1.2616, abs=1e-4) == max(weights.values)
        assert weights.values[26] == 0.0 and sum(weights.values) == pytest.approx(1.0, abs=1e-3)
    else:
        assert weights.source == UNIFORM and set(weights.values) == {1 / language.num_attention_heads}


def test_a_linked_export_of_the_3bs_shapes_keeps_its_tied_head_once(tmp_path):
    """Two layers of it: the whole is linked by `make check-models`."""
    sizes = Sizes(2048, 11008, 2, 16, 2, 4096, 1280, 3420, 2, 16, (1,))
    folder = make_sparse_checkpoint(tmp_path / "model", sizes, tied=True, shards=2)
    assert export([str(folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16", "--link"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.embeddings.file.endswith(".safetensors")
    linked = {name for name, entry in manifest.files.items() if entry.weights}
    assert linked == {path.name for path in folder.glob("*.safetensors")}


def test_an_export_without_calibrated_weights_says_so_once_and_what_to_do(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "model")
    command = [str(folder), "--out", str(tmp_path / "out"), "--json"]
    assert export(command) == 0
    told = capsys.readouterr()
    assert told.err.count("head weights") == 1 and "hawk-trt calibrate" in told.err
    assert json.loads(told.out)["head_weights"] == UNIFORM
    assert read_manifest(tmp_path / "out").head_weights.source == UNIFORM
    assert export(command) == 0
    assert "head weights" not in capsys.readouterr().err  # up to date: it was said


def test_given_head_weights_are_not_remarked_upon(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "model")
    write_json(tmp_path / "mine.json", [0.1, 0.2, 0.3, 0.4])
    assert export([str(folder), "--out", str(tmp_path / "out"), "--head-weights", str(tmp_path / "mine.json")]) == 0
    assert "head weights" not in capsys.readouterr().err


def test_the_shapes_of_random_exports_are_those_of_the_released_configs(name):
    config, shape = released(name), shape_config(f"qwen2.5-vl-{name.lower()}")
    assert read_config(shape).language == read_config(config).language
    assert read_config(shape).vision == read_config(config).vision
