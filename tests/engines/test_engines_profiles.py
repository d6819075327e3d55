"""What the engines must take, planned from the manifest and the flags."""

import re
from dataclasses import replace

import numpy as np
import pytest

from engines import profiles
from engines.prepare import prepare
from engines.profiles import TENSORRT_TARGETS, TOPK_LIMIT, LargestRequest, choose_target, plan_profiles, vision_ranges
from hawk_trt.bundle import Bundle, TensorEntry, WeightFormat
from hawk_trt.engine_folder import DECODE, PREFILL, Limits
from hawk_trt.errors import InvalidInput
from hawk_trt.models.qwen2_5_vl import window_plan
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.stages import (
    CONTEXT_LEN,
    DECODER,
    FIRST_LAYER,
    MAX_LINEAR_TOKENS,
    PORTABLE,
    STAGES,
    TENSORRT,
    VISION,
)
from hybrid import HYBRID

INTERNVL = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3, "patch_size": 14,
    "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": 896, "image_size": 448, "norm": "layer_norm",
    "layer_norm_eps": 1e-6, "qk_norm": False, "qkv_bias": True, "min_tiles": 1, "max_tiles": 12, "use_thumbnail": True,
}  # fmt: skip
LIMITS = Limits(visual_tokens=300, prompt_tokens=400, context=256, batch=2)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.load(tiny_bundle)


def planned(bundle, stage, target=TENSORRT, limits=LIMITS):
    graph = prepare(bundle, stage, target, max_context=limits.context, plugin=False)
    return [
        {entry.name: (entry.min, entry.opt, entry.max) for entry in ranges}
        for ranges in plan_profiles(bundle.manifest, stage, graph.inputs, limits)
    ]


@pytest.mark.parametrize("target", TENSORRT_TARGETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_input_has_a_range_in_which_min_opt_and_max_ascend(bundle, stage, target):
    graph = prepare(bundle, stage, target, max_context=LIMITS.context, plugin=False)
    plans = plan_profiles(bundle.manifest, stage, graph.inputs, LIMITS)
    assert len(plans) == (1 if stage == VISION else 2)
    for ranges in plans:
        assert [entry.name for entry in ranges] == [entry.name for entry in graph.inputs]
        for entry in ranges:
            assert all(low <= opt <= high for low, opt, high in zip(entry.min, entry.opt, entry.max, strict=True)), (
                entry
            )


@pytest.mark.parametrize("limits", [LIMITS, Limits(1, 2, 2, 1), Limits(16384, 20000, 4096, 8)])
def test_one_word_has_one_size_in_all_inputs_of_a_profile(bundle, limits):
    for stage in STAGES:
        for target in TENSORRT_TARGETS:
            graph = prepare(bundle, stage, target, max_context=limits.context, plugin=False)
            for ranges in plan_profiles(bundle.manifest, stage, graph.inputs, limits):
                for column in ("min", "opt", "max"):
                    sizes = {}
                    for tensor, entry in zip(graph.inputs, ranges, strict=True):
                        for word, size in zip(tensor.shape, getattr(entry, column), strict=True):
                            assert sizes.setdefault(word, size) == size
                    assert sizes.get("num_kept_total", 0) <= sizes.get("seq_len", sizes.get("num_kept_total", 0))


def test_prefill_takes_the_limits_and_decode_one_token(bundle):
    prefill, decode = planned(bundle, FIRST_LAYER)[PREFILL], planned(bundle, FIRST_LAYER)[DECODE]
    hidden = bundle.manifest.language.hidden_size
    assert prefill["text_embeds"][2] == (800, hidden) and prefill["text_embeds"][0] == (1, hidden)
    assert prefill["source_rows"][2] == (2, 400)
    assert prefill["visual_embeds"][2] == (600, hidden)  # of both rows
    assert prefill["slots"][2] == (256,)  # what is kept goes into the cache
    assert decode["text_embeds"] == ((1, hidden), (2, hidden), (2, hidden))
    assert decode["slots"] == ((1,), (1,), (1,))
    assert decode["visual_embeds"] == ((1, hidden),) * 3
    assert prefill["context_slots"][2] == decode["context_slots"][2] == (256,)
    assert {shape[2] for shape in prefill["past_key.0"]} == {256}  # static


def test_the_portable_cache_is_empty_in_prefill_and_as_long_as_the_context_in_decode(bundle):
    prefill, decode = planned(bundle, DECODER, PORTABLE)
    assert {shape[2] for shape in prefill["past_key.1"]} == {0}
    assert (decode["past_key.1"][0][2], decode["past_key.1"][2][2]) == (1, 256)


def test_the_window_ranges_hold_every_frame_that_a_processor_makes(bundle):
    vision, tokens = bundle.manifest.vision, 200
    (ranges,) = vision_ranges(vision, tokens, 1)
    side = vision.window_side
    most = 0
    for high in range(1, tokens + 1):
        for wide in range(1, tokens // high + 1):
            plan = window_plan(2 * high, 2 * wide, 2, side)
            sizes = {
                "num_patches": len(plan["window_slot"]),
                "num_windows": len(plan["window_index"]),
                "window_len": plan["window_index"].shape[1],
            }
            most = max(most, sizes["num_windows"])
            assert all(ranges[word].low <= size <= ranges[word].high for word, size in sizes.items()), (high, wide)
    assert most == ranges["num_windows"].high  # and no larger than need be


def test_what_is_tuned_for_is_the_bundles_share_of_a_typical_image(bundle):
    inputs = (TensorEntry("hidden_states", "float32", ("num_kept_total",)),)
    (entry,) = plan_profiles(bundle.manifest, DECODER, inputs, LIMITS)[PREFILL]
    assert entry.opt == (min(int(np.ceil(300 * 0.2)) + 128, 256),)


def test_defaults_fit_the_top_k_of_tensorrt_and_the_model(bundle):
    limits = LargestRequest().limits(bundle.manifest, plugin=False)
    assert limits == Limits(4096, 5120, TOPK_LIMIT, 1, vision_batch=4)
    shared = LargestRequest().limits(bundle.manifest, plugin=False, shared_memory=True)
    assert shared == Limits(2048, 3072, 2048, 1, vision_batch=4)
    assert LargestRequest(max_visual_tokens=4096).limits(bundle.manifest, plugin=False, shared_memory=True) == Limits(
        4096, 5120, 2048, 1, vision_batch=4
    )
    short = replace(bundle.manifest, language=replace(bundle.manifest.language, max_position_embeddings=512))
    assert LargestRequest().limits(short, plugin=True).context == 512


def test_a_hybrid_models_prompts_are_as_long_as_its_chunks_at_most(bundle):
    hybrid = replace(bundle.manifest, language=replace(HYBRID, max_position_embeddings=4096))
    asked = LargestRequest(max_prompt_tokens=MAX_LINEAR_TOKENS)
    assert asked.limits(hybrid, plugin=True).prompt_tokens == MAX_LINEAR_TOKENS
    with pytest.raises(InvalidInput, match=f"--max-prompt-tokens: got {MAX_LINEAR_TOKENS + 1}, .*linear layers"):
        replace(asked, max_prompt_tokens=MAX_LINEAR_TOKENS + 1).limits(hybrid, plugin=True)


def test_more_kept_tokens_than_top_k_takes_are_refused_without_the_plugin(bundle):
    asked = {"max_visual_tokens": 4096, "max_prompt_tokens": 5000, "max_context": 4000}
    with pytest.raises(
        InvalidInput, match=r"up to 4000 tokens may be kept, and TensorRT's TopK takes 3840.*make plugin"
    ):
        LargestRequest(**asked).limits(bundle.manifest, plugin=False)
    assert LargestRequest(**asked).limits(bundle.manifest, plugin=True).kept_tokens == 4000
    assert LargestRequest(**{**asked, "max_visual_tokens": 99, "max_prompt_tokens": 3840}).limits(
        bundle.manifest, plugin=False
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_visual_tokens": 0}, "--max-visual-tokens: got 0, expected at least 1"),
        ({"max_visual_tokens": 100, "max_prompt_tokens": 100}, "--max-prompt-tokens: got 100, expected at least 101"),
        ({"max_context": 1}, "--max-context: got 1, expected at least 2"),
        ({"max_context": 100_000}, "--max-context: got 100000, expected at most 4096, the model's own context"),
        ({"batch": 0}, "--batch: got 0, expected at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_their_flag(bundle, asked, message):
    with pytest.raises(InvalidInput, match=message):
        LargestRequest(**asked).limits(bundle.manifest, plugin=True)


def test_an_unknown_dimension_is_refused(bundle):
    with pytest.raises(InvalidInput, match="dimension 'num_slices' has no range"):
        plan_profiles(bundle.manifest, VISION, (TensorEntry("pixel_values", "float32", ("num_slices", 3)),), LIMITS)


@pytest.mark.parametrize(
    ("tensorrt", "dtype", "held", "chosen"),
    [
        ("10.3.0", "bfloat16", TENSORRT_TARGETS, PORTABLE),
        ("10.14.1", "bfloat16", TENSORRT_TARGETS, PORTABLE),
        ("10.15.1.29", "bfloat16", TENSORRT_TARGETS, TENSORRT),
        ("11.4.0.106", "float16", TENSORRT_TARGETS, TENSORRT),
        ("11.4.0.106", "float32", TENSORRT_TARGETS, TENSORRT),
        ("10.16.1.11", "bfloat16", (PORTABLE,), PORTABLE),
    ],
)
def test_the_target_is_the_best_that_tensorrt_and_the_bundle_allow(bundle, tensorrt, dtype, held, chosen):
    assert choose_target(replace(bundle.manifest, dtype=dtype, targets=held), tensorrt) == chosen


@pytest.mark.parametrize(
    ("tensorrt", "dtype", "held", "asked", "message"),
    [
        ("10.3.0", "bfloat16", TENSORRT_TARGETS, TENSORRT, "begin with 10.15. Use --target portable"),
        ("10.3.0", "bfloat16", (TENSORRT,), None, "this bundle holds tensorrt.*Export again with --target portable"),
        (
            "11.4.0",
            "bfloat16",
            (PORTABLE,),
            TENSORRT,
            "this bundle holds portable.*again with --target tensorrt",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_what_helps(bundle, tensorrt, dtype, held, asked, message):
    with pytest.raises(InvalidInput, match=message):
        choose_target(replace(bundle.manifest, dtype=dtype, targets=held), tensorrt, asked)


def test_context_slots_is_the_word_of_the_target_tensorrt_alone(bundle):
    for stage in (FIRST_LAYER, DECODER):
        for target in TENSORRT_TARGETS:
            words = {
                word for t in prepare(bundle, stage, target, max_context=9, plugin=False).inputs for word in t.shape
            }
            assert (CONTEXT_LEN in words) == (target == TENSORRT)


def test_a_vision_call_takes_several_frames_that_together_are_no_larger_than_the_largest(bundle):
    one, several = vision_ranges(bundle.manifest.vision, 300, 4)
    assert (one["num_frames"].high, one["num_patches"].high) == (1, 1200)
    assert (several["num_frames"].high, several["num_patches"].high) == (4, 300)
    assert len(vision_ranges(bundle.manifest.vision, 3, 4)) == 1
    tiles = InternVLVision(**INTERNVL)
    assert vision_ranges(tiles, 4096, 13) == [{"num_tiles": (1, 13, 13)}]
    assert vision_ranges(tiles, 1000, 13) == [{"num_tiles": (1, 3, 3)}]  # of 256 tokens each
    assert LargestRequest().limits(bundle.manifest, plugin=False).vision_batch == 4
    with pytest.raises(InvalidInput, match="--vision-batch: got 0"):
        LargestRequest(vision_batch=0).limits(bundle.manifest, plugin=False)


def test_integers_of_eight_bits_in_blocks_are_refused_since_tensorrt_documents_four(bundle):
    quantised = replace(bundle.manifest, weights=WeightFormat(8, 64))
    with pytest.raises(InvalidInput, match=r"got int8 in blocks of 64.*--dtype int4"):
        choose_target(quantised, "10.16.1")
    for allowed in (WeightFormat(4, 64), WeightFormat(8, 0)):  # a scale a row
        assert choose_target(replace(quantised, weights=allowed), "10.16.1") == TENSORRT


def test_the_help_names_the_defaults_that_hold():
    told = [int(number) for number in re.findall(r"(?:default: |; )(\d+)", LargestRequest.__doc__)]
    visual, context = (profiles.DEFAULT_VISUAL_TOKENS, profiles.DEFAULT_VISUAL_TOKENS_SHARED), (TOPK_LIMIT, 2048)
    of_vision = (profiles.DEFAULT_FRAMES, profiles.DEFAULT_TILES)
    assert told == [*visual, profiles.DEFAULT_TEXT_TOKENS, *context, *of_vision]
    assert profiles.DEFAULT_CONTEXT_SHARED == 2048
