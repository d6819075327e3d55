"""The vision host plan: a plain evaluation of it against transformers' vision tower."""

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from export.vision.qwen2_5_vl import qwen2_5_vl_entry
from hawk_trt.errors import InvalidInput
from hawk_trt.models.family import Patches
from hawk_trt.models.qwen2_5_vl import Qwen25VL, window_plan
from hawk_trt.models.vision_config import Qwen25Vision
from hawk_trt.stages import TENSORRT

VISION = Qwen25Vision(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=32,  # 4 x 4 merge blocks
    out_hidden_size=24,
    fullatt_block_indexes=(1,),
    tokens_per_second=2.0,
    rope_theta=10000.0,
)
FAMILY = Qwen25VL(VISION)
PATCH_DIM = 3 * 2 * 4 * 4
GRIDS = [
    [(1, 8, 8)],  # one whole window
    [(1, 2, 2)],  # one merge block
    [(1, 10, 14)],  # edge windows on both sides
    [(1, 2, 34)],
    [(1, 34, 2)],
    [(1, 16, 8), (1, 16, 8)],  # two equal images in one call
    [(1, 6, 10), (1, 10, 6), (2, 6, 10)],  # different ones, and a video
    [(3, 8, 12)],
]


def random_patches(grid, seed=0):
    rows = sum(t * h * w for t, h, w in grid)
    pixels = np.random.default_rng(seed).standard_normal((rows, PATCH_DIM), dtype=np.float32)
    return Patches(pixels, np.array(grid, np.int64))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    sizes = msgspec.structs.asdict(VISION)
    del sizes["tokens_per_second"], sizes["rope_theta"]
    config = Qwen2_5_VLVisionConfig(**sizes)
    config._attn_implementation = "eager"
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


@torch.no_grad()
def evaluate(tower, feeds):
    """The vision stage, from the tower's weights and the plan alone: no grid, no sizes."""
    feed = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    pixels = feed["pixel_values"]
    frames, num_patches, _ = pixels.shape
    heads, head_dim = VISION.num_heads, VISION.hidden_size // VISION.num_heads
    inv_freq = 1.0 / VISION.rope_theta ** (torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = (feed["patch_positions"][..., None] * inv_freq).flatten(1).repeat(1, 2)

    def rotate(x):  # [frames, num_patches, heads, head_dim]
        first, second = x.chunk(2, -1)
        return x * angles.cos()[:, None] + torch.cat((-second, first), -1) * angles.sin()[:, None]

    def attend(q, k, v, mask):  # [batch, length, heads, head_dim]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5
        scores = scores.masked_fill(~mask[:, None, None, :], -1e9)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    windows, length = feed["window_index"].shape
    x = tower.patch_embed(pixels.reshape(-1, PATCH_DIM)).reshape(frames, num_patches, -1)
    for number, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(frames, num_patches, 3, heads, head_dim).unbind(2)
        q, k = rotate(q), rotate(k)
        if number in VISION.fullatt_block_indexes:
            out = attend(q, k, v, torch.ones(1, num_patches, dtype=torch.bool))
        else:
            batch = [
                part[:, feed["window_index"]].reshape(frames * windows, length, heads, head_dim) for part in (q, k, v)
            ]
            out = attend(*batch, feed["window_mask"].repeat(frames, 1))
            out = out.reshape(frames, windows * length, heads, head_dim)[:, feed["window_slot"]]
        x = x + block.attn.proj(out.reshape(frames, num_patches, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("max_patches", [1, 100, 100_000])
def test_the_plan_alone_reproduces_the_vision_tower_of_transformers(tower, grid, max_patches):
    patches = random_patches(grid)
    parts = [evaluate(tower, feeds) for feeds in FAMILY.vision_feeds(patches, max_patches)]
    with torch.no_grad():
        theirs = tower(torch.from_numpy(patches.pixel_values), torch.tensor(grid)).pooler_output
    torch.testing.assert_close(torch.cat(parts), theirs, rtol=0, atol=2e-6)  # 5e-7 measured


@pytest.mark.parametrize("high", range(1, 12))
@pytest.mark.parametrize("wide", [1, 2, 3, 4, 5, 7, 8, 9, 13, 36])
def test_windows_equal_transformers(high, wide):
    grid = torch.tensor([[1, 2 * high, 2 * wide]])
    plan = window_plan(2 * high, 2 * wide, 2, 4)
    order, bounds = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
    np.testing.assert_array_equal(plan["window_mask"].sum(axis=1), np.diff(bounds))
    patches = torch.arange(4 * high * wide).reshape(-1, 4)[order].reshape(-1)
    np.testing.assert_array_equal(plan["window_index"][plan["window_mask"]], patches)


@pytest.mark.parametrize(("high", "wide"), [(2, 2), (10, 14), (16, 16), (34, 2)])
def test_a_patch_finds_its_way_into_its_window_and_back(high, wide):
    plan = window_plan(high, wide, 2, 4)
    values = np.arange(high * wide)
    batched = np.where(plan["window_mask"], values[plan["window_index"]], -1)
    np.testing.assert_array_equal(batched.reshape(-1)[plan["window_slot"]], values)
    assert not plan["window_index"][~plan["window_mask"]].any()


def test_feeds_have_the_names_dtypes_and_shapes_of_the_spec():
    spec = qwen2_5_vl_entry(FAMILY.vision, "float32", TENSORRT)
    for feeds in FAMILY.vision_feeds(random_patches(GRIDS[6]), 10_000):
        assert list(feeds) == [tensor.name for tensor in spec.inputs]
        sizes: dict[str, int] = {}
        for tensor in spec.inputs:
            array = feeds[tensor.name]
            assert array.dtype == np.dtype(tensor.dtype), tensor.name
            assert len(array.shape) == len(tensor.shape)
            for size, word in zip(array.shape, tensor.shape, strict=True):
                assert size == (word if isinstance(word, int) else sizes.setdefault(word, size)), tensor.name
    assert [(t.name, t.shape) for t in spec.outputs] == [("visual_embeds", ("num_visual", 24))]


def test_frames_of_one_size_share_a_call_up_to_the_bound():
    def calls(grid, max_patches):
        return [f["pixel_values"].shape[:2] for f in FAMILY.vision_feeds(random_patches(grid), max_patches)]

    assert calls([(1, 8, 8), (3, 8, 8), (1, 4, 4)], 1000) == [(4, 64), (1, 16)]
    assert calls([(1, 8, 8), (3, 8, 8), (1, 4, 4)], 192) == [(3, 64), (1, 64), (1, 16)]
    assert calls([(5, 8, 8)], 10) == [(1, 64)] * 5
    assert calls([(1, 4, 8), (1, 8, 4)], 1000) == [(1, 32), (1, 32)]
    assert calls([], 1000) == []


def test_a_frame_alone_gives_the_rows_that_it_gives_in_company():
    grid = [(2, 10, 14)]
    patches = random_patches(grid)
    together = next(FAMILY.vision_feeds(patches, 10_000))["pixel_values"]
    apart = [feeds["pixel_values"] for feeds in FAMILY.vision_feeds(patches, 1)]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_half_precision_pixels_are_taken_as_float32():
    patches = random_patches([(1, 4, 4)])
    half = Patches(patches.pixel_values.astype(np.float16), patches.grid_thw)
    assert next(FAMILY.vision_feeds(half, 100))["pixel_values"].dtype == np.float32


def test_shared_plans_cannot_be_changed_by_a_caller():
    feeds = next(FAMILY.vision_feeds(random_patches([(1, 4, 4)]), 100))
    with pytest.raises(ValueError, match="read-only"):
        feeds["window_index"][0, 0] = 1
    onnxruntime.OrtValue.ortvalue_from_numpy(feeds["window_index"])  # read-only arrays feed a session all the same


@pytest.mark.parametrize(
    ("pixels", "grid", "words"),
    [
        (np.zeros((16, PATCH_DIM), np.float32), [(1, 4, 5)], ("grid_thw[0]", "[1, 4, 5]", "multiples of 2")),
        (np.zeros((15, PATCH_DIM), np.float32), [(1, 4, 4)], ("float32[15, 96]", "expected 16 rows")),
        (np.zeros((16, 95), np.float32), [(1, 4, 4)], ("float32[16, 95]", "float32[num_patches, 96]")),
        (np.zeros((16, PATCH_DIM), np.uint8), [(1, 4, 4)], ("uint8[16, 96]", "float32")),
        (np.zeros(16, np.float32), [(1, 4, 4)], ("float32[16]", "float32[num_patches, 96]")),
        (np.zeros((16, PATCH_DIM), np.float32), [(1, 4)], ("grid_thw", "int64[1, 2]")),
        (np.zeros((16, PATCH_DIM), np.float32), [], ("expected 0 rows",)),
    ],
)
def test_pixels_that_do_not_fit_their_grid_are_refused_before_any_call(pixels, grid, words):
    with pytest.raises(InvalidInput) as error:
        next(FAMILY.vision_feeds(Patches(pixels, np.array(grid, np.int64)), 100))
    assert all(word in str(error.value) for word in words), str(error.value)
