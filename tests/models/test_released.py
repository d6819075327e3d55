"""The table of models in docs/models.md: its numbers follow from the sizes, and each model's graphs can be built."""

import math
import re
from pathlib import Path

import pytest

from export.architectures import read_config
from export.graphs import build_graphs, inventory
from export.quantisation import fits_blocks, layout, may_be_quantised
from export.random_checkpoint import random_checkpoint
from export.vision import GRAPHS
from export.weights import WeightStore
from hawk_trt.bundle import WeightFormat
from hawk_trt.stages import CUDA, PORTABLE, STAGES, TENSORRT, VISION
from released import MODELS, with_few_layers

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    row[0]: row[1:]
    for row in re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
}
INT4 = WeightFormat(bits=4, block_size=64)


def bytes_of(name, shape, scoring_layer):
    """In an int4 bundle with bfloat16 activations."""
    if may_be_quantised(name, shape, scoring_layer) and fits_blocks(shape, INT4):
        integers, _, scales = layout(shape, INT4, "bfloat16")
        return integers + scales
    return 2 * math.prod(shape)


def test_the_table_has_every_model():
    assert ROWS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_memory_of_the_table_follow_from_the_sizes(name):
    model = read_config(MODELS[name])
    shapes = inventory(model.language, model.vision)
    count = sum(math.prod(shape) for shape in shapes.values())
    int4 = sum(bytes_of(*tensor, model.language.scoring_layer) for tensor in shapes.items())
    expected = (f"{count / 1e9:.2f}", f"{4 * count / 1e9:.1f}", f"{2 * count / 1e9:.1f}", f"{int4 / 1e9:.1f}")
    assert ROWS[name] == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_graphs_of_every_model_can_be_built(name, tmp_path):
    config = with_few_layers(MODELS[name]) | {"eos_token_id": 151645}
    model = read_config(config)
    checkpoint = random_checkpoint(tmp_path, config)
    store = WeightStore(checkpoint, "bfloat16")
    store.table((model.language.vocab_size, model.language.hidden_size))
    for target in (CUDA, TENSORRT, PORTABLE):
        graphs = build_graphs(model.vision, model.language, store, "bfloat16", target, "l2")
        assert tuple(graphs) == STAGES
        assert [value.name for value in graphs[VISION].model().graph.input] == [
            one.name for one in GRAPHS[model.vision.family].entry(model.vision, "bfloat16", target).inputs
        ]
    assert not checkpoint.unused()


def test_every_fine_tune_of_the_page_names_a_base_of_the_table():
    fine_tunes = re.findall(r"^\| [^|]+ \| ([\w.-]+) \|[^|]*\|$", PAGE.partition("## Fine-tunes")[2], re.M)
    bases = [base for base in fine_tunes if base not in ("base", "---")]
    assert len(bases) >= 10 and not set(bases) - MODELS.keys()
