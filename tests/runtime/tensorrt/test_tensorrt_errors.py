"""What the TensorRT backend refuses and how it says so, and that nothing of it stays on the GPU."""

import dataclasses
import gc
import sys

import numpy as np
import pytest

from cuda_standin import CUresult
from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig, Request
from hawk_trt.bundle import ENGINES_MANIFEST, manifest_bytes
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import BackendError, BundleError, InvalidInput
from hawk_trt.inputs.layout import collate
from trt_machine import engine_folder

pytestmark = pytest.mark.usefixtures("machines")
SAMPLES = list(generate(13, 3))
KEEP_ALL = PruningConfig(keep_ratio=1.0)


def load(folder, **options):
    return Pipeline.load(folder, **options)


def answer(pipe, tokens=4, **options):
    return pipe.generate(SAMPLES[0].question, [SAMPLES[0].image], max_new_tokens=tokens, ignore_eos=True, **options)


def changed(folder, out, **fields):
    """An engine folder with another manifest."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).hardlink_to(file)
    manifest = dataclasses.replace(EngineFolder.load(folder).manifest, **fields)
    (out / ENGINES_MANIFEST).unlink()
    (out / ENGINES_MANIFEST).write_bytes(manifest_bytes(manifest))
    return out


def test_closing_gives_everything_back_and_closing_again_does_nothing(engines, machines):
    pipe = load(engines)
    answer(pipe)
    assert machines.driver.live() == {
        "context": 1, "stream": 1, "event": 2, "executable": 1, "device": 1, "pinned": 3
    }  # fmt: skip
    pipe.close()
    assert machines.driver.live() == {}
    pipe.close()
    with pytest.raises(BackendError, match="closed"):
        answer(pipe)


FUNCTIONS = (
    "cuStreamCreate", "cuMemAlloc", "cuMemAllocHost", "cuEventCreate", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync",
    "cuMemsetD8Async", "cuStreamSynchronize", "cuEventRecord", "cuGraphInstantiate", "cuGraphLaunch",
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_failing_call_is_named_and_leaves_nothing_behind(engines, machines, function):
    for skipped in (0, 1, 3):
        machines.driver.fail = {function: [skipped, CUresult.CUDA_ERROR_INVALID_VALUE]}
        if function == "cuGraphInstantiate":  # decoding can go on without a graph
            if skipped == 0:
                with (
                    pytest.warns(RuntimeWarning, match="cuGraphInstantiate: CUDA_ERROR_INVALID_VALUE"),
                    load(engines) as p,
                ):
                    answer(p)
        else:
            try:
                with load(engines) as pipe:
                    answer(pipe, 8)
            except BackendError as error:
                assert f"{function}: CUDA_ERROR_INVALID_VALUE" in str(error)
            else:
                assert machines.driver.fail[function][0] >= 0, "the status went unnoticed"
        machines.driver.fail = {}
        gc.collect()
        assert machines.driver.live() == {}


def test_a_fault_on_the_gpu_is_told_once_though_every_later_call_fails_too(engines, machines):
    with pytest.raises(BackendError, match=r"cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS"), load(engines) as pipe:
        answer(pipe)
        machines.driver.put("kernel", lambda: False)
        answer(pipe)
    assert machines.driver.calls["cuMemFree"] == 1
    machines.driver.blocks.clear()  # a context that failed takes its memory with it
    machines.driver.handles.clear()
    machines.driver.retained = 0


def test_too_little_gpu_memory_says_how_much_there_is_and_what_helps(engines, machines):
    machines.driver.capacity = 1 << 20
    with pytest.raises(BackendError, match=r"GPU memory: got 0.00 GiB free of 0.00, expected 0.\d\d .* --max-context"):
        load(engines)


def test_without_a_gpu_no_tensorrt_object_is_made(engines, machines):
    machines.driver.gpus = 0
    with pytest.raises(BackendError, match="got cuda:0, this machine has 0 GPUs"):
        load(engines)
    with pytest.raises(BackendError, match="got cuda:3"):
        load(engines, device="cuda:3")


def test_engines_of_another_machine_are_refused_before_tensorrt_sees_them(engines, machines):
    machines.trt.__version__ = "10.3.0"
    with pytest.raises(
        BundleError, match=r"built for sm_90 .*10\.16.*, this is .* 10\.3\.0\. Rebuild: python -m engines"
    ):
        load(engines)


def test_other_packages_missing_are_named_with_what_brings_them(engines, monkeypatch):
    for module, message in (("tensorrt", "JetPack"), ("cuda.bindings", "cuda-bindings==12")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(BackendError, match=message):
                load(engines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, 'TensorRT runs on "cuda"'),
        ({"target": "portable"}, "these engines are of tensorrt"),
    ],
)
def test_what_engines_cannot_be_loaded_with_is_refused(engines, options, message):
    with pytest.raises(BackendError, match=message):
        load(engines, **options)


def test_a_folder_of_engines_runs_in_tensorrt_unasked(engines):
    with Pipeline.load(engines) as pipe:
        assert pipe.backend.name == "tensorrt"


def test_a_plan_that_tensorrt_cannot_read_is_refused_with_its_reason(engines, monkeypatch):
    import tensorrt_standin

    def broken(runtime, _):
        runtime.refuse("Serialization assertion failed")

    monkeypatch.setattr(tensorrt_standin.Runtime, "deserialize_cuda_engine", broken)
    with pytest.raises(BackendError, match=r"vision.plan: .* cannot load it: Serialization assertion failed. Rebuild"):
        load(engines)


def test_a_plan_with_other_tensors_than_its_manifest_is_refused(engines, tmp_path):
    manifest = EngineFolder.load(engines).manifest
    decoder = manifest.plans[2]
    renamed = dataclasses.replace(
        decoder, outputs=(dataclasses.replace(decoder.outputs[0], name="other"), *decoder.outputs[1:])
    )
    folder = changed(engines, tmp_path / "engines", plans=(*manifest.plans[:2], renamed))
    with pytest.raises(BackendError, match=r"decoder.plan: its tensors are not those of engines.json: logits .*other"):
        load(folder)


def test_the_plugin_is_loaded_before_the_plans_and_once(tiny_bundle, tmp_path, machines):
    library = tmp_path / "libhawk.so"
    library.write_bytes(b"code")
    folder = engine_folder(tiny_bundle, tmp_path / "engines", "tensorrt", plugin=library)
    with load(folder) as pipe, load(folder):
        answer(pipe)
    assert machines.trt.libraries == [str(folder / "libhawk.so")]


def test_a_plan_that_needs_the_plugin_does_not_load_without_it(tiny_bundle, tmp_path, machines):
    library = tmp_path / "libhawk.so"
    library.write_bytes(b"code")
    folder = engine_folder(tiny_bundle, tmp_path / "engines", "tensorrt", plugin=library)
    machines.trt.load_library = lambda _: None
    with pytest.raises(BackendError, match=r"libhawk.so: TensorRT cannot load the plugin.* make plugin"):
        load(folder)


def test_prompts_beyond_what_the_engines_take_name_the_option_that_rebuilds(engines, tiny_bundle, tmp_path):
    images = [s.image for s in SAMPLES]
    small = engine_folder(
        tiny_bundle,
        tmp_path / "small",
        "tensorrt",
        max_visual_tokens=100,
        max_prompt_tokens=120,
        max_context=90,
        batch=2,
    )
    with load(small) as pipe, load(engines) as roomy:
        with pytest.raises(BackendError, match=r"seq_len = \d+, .* larger --max-prompt-tokens: python -m engines"):
            pipe.generate("What is red?" * 12, images[:1])
        with pytest.raises(InvalidInput, match=r"KV cache: got \d+ tokens .* engines hold 90.* larger --max-context"):
            pipe.generate("What is red?" * 8, images[:1], pruning=KEEP_ALL)
        hellos = pipe.generate_batch([Request("Hello?")] * 3, max_new_tokens=3)  # two, then one
        assert len({tuple(result.token_ids) for result in hellos}) == 1
        with pytest.raises(
            BackendError, match=r"visual tokens: got 1280, these engines take 1024. .*--max-visual-tokens"
        ):
            roomy.generate("What is red?", [s.image for s in SAMPLES for _ in range(20)][:20])
        answer(pipe)  # a refusal leaves the engines usable


def test_a_prompt_of_which_nothing_is_kept_is_refused(engines):
    """K = 0: the plugin would write out of bounds."""
    with load(engines) as pipe:
        inputs = pipe.prepare(SAMPLES[0].question, [SAMPLES[0].image])
        layout = pipe.processor.layout(inputs)
        prompt = collate([layout], [5], [None], np.ones(8, np.float32))
        with pytest.raises(BackendError, match=r"num_kept_total = 0, first_layer\.plan was built for 1 to"):
            pipe.backend.prefill(
                dataclasses.replace(prompt, num_kept_total=0),
                pipe.vision_cache.encode([(inputs, layout)])[0],
                64,
                logits=False,
            )


def test_an_answer_ends_where_the_cache_does(tiny_bundle, tmp_path):
    folder = engine_folder(
        tiny_bundle, tmp_path / "engines", "tensorrt", max_visual_tokens=64, max_prompt_tokens=100, max_context=50
    )
    with load(folder) as pipe, Pipeline.load(tiny_bundle, threads=1) as bundle:
        got = answer(pipe, 64)
        kept = len(got.kept_indices)
        assert got.finish_reason == "length"
        assert len(got.token_ids) == 50 - kept + 1
        assert got.token_ids == answer(bundle, 64).token_ids[: len(got.token_ids)]
        assert pipe.backend.cache.ends.max() == 50


def test_a_write_beyond_the_cache_is_refused_on_the_host(tiny_bundle, tmp_path):
    folder = engine_folder(
        tiny_bundle, tmp_path / "engines", "tensorrt", max_visual_tokens=64, max_prompt_tokens=100, max_context=50
    )
    with load(folder) as pipe:
        stream = pipe.stream(SAMPLES[0].question, [SAMPLES[0].image], max_new_tokens=64)
        stream._scheduler.step()
        step = ([stream._sequence.row], np.array([5]), np.array([100]))
        for _ in range(50 - pipe.backend.cache.ends.max()):
            pipe.backend.decode(*step, logits=False)
        with pytest.raises(BackendError, match=r"got 51 columns to hold, these engines hold 50"):
            pipe.backend.decode(*step, logits=False)


def test_after_values_that_are_not_finite_the_cache_is_zeroed(engines, machines):
    with load(engines) as pipe:
        expected = answer(pipe, 6, return_logits=True)
        zeroed = machines.driver.enqueued["memset"]
        inputs = pipe.prepare(SAMPLES[0].question, [s.image for s in SAMPLES])
        bad = dataclasses.replace(inputs, pixel_values=np.full_like(inputs.pixel_values, np.nan))
        with pytest.raises(BackendError, match=r"not finite|non-finite"):
            pipe.generate(bad, pruning=KEEP_ALL)
        assert machines.driver.enqueued["memset"] == zeroed == 1
        got = answer(pipe, 6, return_logits=True)
        assert machines.driver.enqueued["memset"] == zeroed + 1
        np.testing.assert_array_equal(got.logits, expected.logits)
        answer(pipe)
        assert machines.driver.enqueued["memset"] == zeroed + 1


def test_a_refused_enqueue_tells_why_and_the_next_generation_works(engines, monkeypatch):
    import tensorrt_standin

    with load(engines) as pipe:
        expected = answer(pipe)
        with monkeypatch.context() as patch:
            ready = tensorrt_standin.Context._ready

            def refuse(context, stream):
                if context.engine.told["stage"] == "decoder":
                    raise tensorrt_standin.Refused("enqueueV3: no memory for tactic 0x2a")
                return ready(context, stream)

            patch.setattr(tensorrt_standin.Context, "_ready", refuse)
            with pytest.raises(BackendError, match=r"decoder.plan: TensorRT refused enqueue: .*tactic 0x2a"):
                answer(pipe)
        assert answer(pipe).token_ids == expected.token_ids
