"""Caches that stand still: a decode step copies no key or value but the new ones, by addresses and memory written."""

from pathlib import Path

import pytest

from generations import start
from hawk_trt import Pipeline
from hawk_trt.stages import PORTABLE, STAGES, VISION
from targets import ON_CPU

STEPS = 4


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(tiny_bundle, request):
    with Pipeline.load(tiny_bundle, target=request.param, threads=1) as pipe:
        yield pipe


def written_mb():
    """Resident memory; Linux shares one page among all that were never written to and does not count it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def test_a_decode_step_leaves_keys_and_values_at_their_addresses(pipe):
    row, step = start(pipe, 4 + STEPS)
    cache, _ = row.place
    language = pipe.bundle.manifest.language
    layers = range(language.num_hidden_layers)

    def addresses():
        return {
            name: tensor.data_ptr()
            for layer in layers
            for name, tensor in zip(language.cache_names(layer, past=False), cache.tensors(layer), strict=True)
        }

    before = addresses()
    assert len(set(before.values())) == 2 * len(layers)
    for number in range(STEPS):
        step(number)
        assert addresses() == before
        outputs = {}
        for stage in STAGES:
            if stage != VISION:
                outputs |= cache.steps[1]._bindings[stage].results()
        # where ONNX Runtime says that it wrote
        if pipe.backend.target == PORTABLE:
            assert all(outputs[name].shape()[2] == 1 for name in before)
        else:
            assert {name: outputs[name].data_ptr() for name in before} == before


@pytest.mark.parametrize("pipe", ["cpu"], indirect=True)  # a portable step joins the past of a layer and its column
def test_steps_write_no_more_of_a_large_cache_than_their_own_columns(pipe):
    columns = 150_000
    language = pipe.bundle.manifest.language
    floats = 2 * language.num_hidden_layers * language.num_key_value_heads * columns * language.head_dim
    cache_mb = 4 * floats / 2**20
    before = written_mb()
    row, step = start(pipe, columns)
    prefilled = written_mb()
    for number in range(STEPS):
        step(number)
    stepped = written_mb()
    # Pages may be 2 MB, and scores over all columns are written too; a copy would be all of the cache, 293 MB.
    assert prefilled - before < 0.4 * cache_mb
    assert stepped - prefilled < 0.05 * cache_mb
    assert row.cache(0)[0].shape[1] == 4 + STEPS
