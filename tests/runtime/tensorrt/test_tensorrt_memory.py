"""What lies where: the one allocation, the KV cache, and staging."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_task import generate
from hawk_trt import Pipeline
from hawk_trt.engine_folder import EngineFolder
from trt_machine import Machines, engine_folder

pytestmark = pytest.mark.usefixtures("machines")
SAMPLES = list(generate(14, 3))
IMAGES = [s.image for s in SAMPLES]


@pytest.fixture(scope="module")
def folders(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    return {
        target: engine_folder(tiny_bundle, out / target, target, vision_batch=2) for target in ("tensorrt", "portable")
    }


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_regions_are_aligned_apart_and_inside_one_allocation(folders, target, machines):
    with Pipeline.load(folders[target]) as pipe:
        memory = pipe.backend.memory
        starts = sorted(memory.addresses.values())
        assert all(start % 256 == 0 for start in starts)
        assert len(set(starts)) == len(memory.addresses)
        assert machines.driver.live()["device"] == 1
        assert machines.driver.block(starts[0], memory.size_bytes) is not None
        assert starts[-1] < starts[0] + memory.size_bytes


def test_what_one_stage_writes_the_next_reads_at_one_address(folders):
    engines = EngineFolder.load(folders["tensorrt"])
    first, decoder = engines.plan("first_layer"), engines.plan("decoder")
    handed = {t.name for t in first.outputs} & {t.name for t in decoder.inputs}
    assert handed == {"hidden_states", "kept_position_ids"}
    with Pipeline.load(folders["tensorrt"]) as pipe:
        pipe.generate("What is red?", IMAGES[:1], max_new_tokens=2)
        addresses = {key: dict(one._context.addresses) for key, one in pipe.backend.contexts.items()}
        scratch = {one._context.scratch for one in pipe.backend.contexts.values()}
    for profile in (0, 1):
        for name in handed:
            assert addresses["first_layer", profile][name] == addresses["decoder", profile][name]
    assert addresses["vision", 0]["visual_embeds"] == addresses["first_layer", 0]["visual_embeds"]
    assert len(scratch) == 1


def test_a_portable_plan_needs_room_for_new_columns_and_for_one_tensor_beside_the_cache(folders):
    from hawk_trt.runtime.tensorrt.cache import KVCache

    inplace, portable = (EngineFolder.load(folders[p]).manifest for p in ("tensorrt", "portable"))
    layers, heads, context, dim, batch = 4, 2, 320, 32, 4
    size = 2 * layers * batch * heads * context * dim * 4
    assert KVCache(inplace, 0).nbytes == size
    assert KVCache(portable, 0).nbytes == size + size // context + size // (2 * layers)
    cache, slots = KVCache(inplace, 1 << 20), np.array([0])
    assert cache.addresses()["past_key.2"] == cache.addresses()["present_key.2"]
    cache.ends[slots] += 3
    assert cache.addresses()["past_key.2"] == cache.addresses()["present_key.2"]
    assert cache.dims(1, cache.length_of(slots)) == {"context_len": 256}
    cache.ends[slots] += 253
    assert cache.dims(1, cache.length_of(slots)) == {"context_len": 320}  # the end, which is no multiple of 256
    cache = KVCache(portable, 1 << 20)
    before = cache.addresses()
    assert cache.dims(3, 0) == {"past_len": 0}
    prompt = cache.addresses(1)
    assert prompt["present_key.2"] == before["past_key.2"] + size // (2 * layers) // batch  # its own slot's memory
    assert prompt["past_key.2"] == before["present_key.2"]
    cache.ends[slots] += 3
    assert cache.addresses() == before and before["past_key.2"] < before["past_key.3"] < before["present_key.0"]
    assert cache.dims(1, cache.length_of(slots)) == {"past_len": 320}
    assert cache.kv_start(slots).tolist() == [317]


def test_arrays_larger_than_the_staging_buffer_go_in_parts(machines, monkeypatch):
    from hawk_trt.runtime.tensorrt import cuda

    monkeypatch.setattr(cuda, "STAGING_BYTES", 1024)
    with closing(cuda.CudaDevice(0)) as device, device.active():
        arrays = [np.arange(n, dtype=np.int64) for n in (5, 700, 1, 0, 129)]
        addresses = [device.allocate(array.nbytes) for array in arrays]
        for address, array in zip(addresses, arrays, strict=True):
            source = array.copy()
            device.upload(address, source)
            source[:] = -7  # the caller's array is free at once
        for address, array in zip(addresses, arrays, strict=True):
            np.testing.assert_array_equal(device.download(address, array.shape, array.dtype), array)
    assert machines.driver.faults == []


def test_a_pipeline_with_little_staging_answers_alike(folders, tiny_bundle, monkeypatch):
    from hawk_trt.runtime.tensorrt import cuda

    monkeypatch.setattr(cuda, "STAGING_BYTES", 4096)
    with Pipeline.load(folders["tensorrt"]) as plans, Pipeline.load(tiny_bundle, threads=1) as bundle:
        got, expected = (pipe.generate("What is red?", IMAGES, max_new_tokens=3) for pipe in (plans, bundle))
    assert got.token_ids == expected.token_ids
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)


def test_the_backend_needs_no_torch(repository):
    sources = list(Path(repository, "hawk_trt/runtime/tensorrt").glob("*.py"))
    assert len(sources) > 7
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert not any(f"import {name}" in text for name in ("torch", "pycuda", "cupy", "onnx"))


@pytest.mark.parametrize("integrated", [False, True])
def test_a_gpu_whose_memory_is_the_machines_is_known(integrated):
    with Machines() as machines:
        machines.driver.integrated = integrated
        from hawk_trt.runtime.tensorrt.cuda import shares_memory

        assert shares_memory() is integrated
