"""Vision graph of Qwen2.5-VL: frames of one size in, visual tokens out.

Token-wise ops run on [num_frames * num_patches, dim]. Attention runs on segments: windows in most layers,
whole frames in the full-attention ones. Patches come in window order, and all frames share one plan, so a
full-attention layer needs neither gather nor mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from hawk_trt.models.vision_config import Qwen25Vision
from hawk_trt.stages import VISION, StageSpec

from .. import tensors
from ..graph import GraphBuilder, Weights
from ..layers import add_residual, attention, gated_mlp, linear, mask_bias, rms_norm, rotary_float32
from ..tensors import Shapes
from ..vision.frame_tower import merger, patch_embed, rotary_tables
from ..vision.tiles import Tiles, frame_attention, query_key_value, query_tiles, token_tiles

WEIGHT_FILE = f"{VISION}.data"
_NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class _Segments:
    """How one kind of layer cuts the patches into attention segments.

    Attributes:
        cos, sin: float32 [segments, segment_len, head_dim / 2].
        shape: int64 [4], (segments, segment_len, heads, head_dim).
        mask: bool [segments, 1, len, len], without opset 24 additive [segments, 1, 1, len]; None for whole frames.
        index: int64 [num_windows, window_len] to gather by, None where a segment is a whole frame.
        slot: int64 [num_patches], where to find each patch again.
    """

    cos: ir.Value
    sin: ir.Value
    shape: ir.Value
    mask: ir.Value | None
    index: ir.Value | None
    slot: ir.Value | None


def qwen2_5_vl_shapes(vision: Qwen25Vision) -> Shapes:
    """Names and shapes of all tensors of the vision tower."""
    hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = vision.spatial_merge_size**2 * hidden
    found: Shapes = {
        "visual.patch_embed.proj.weight": (hidden, vision.in_channels, vision.temporal_patch_size, patch, patch),
        "visual.merger.ln_q.weight": (hidden,),
        **tensors.linear("visual.merger.mlp.0", merged, merged),
        **tensors.linear("visual.merger.mlp.2", vision.out_hidden_size, merged),
    }
    for index in range(vision.depth):
        block = f"visual.blocks.{index}"
        found |= {
            f"{block}.norm1.weight": (hidden,),
            f"{block}.norm2.weight": (hidden,),
            **tensors.linear(f"{block}.attn.qkv", 3 * hidden, hidden),
            **tensors.linear(f"{block}.attn.proj", hidden, hidden),
            **tensors.linear(f"{block}.mlp.gate_proj", inner, hidden),
            **tensors.linear(f"{block}.mlp.up_proj", inner, hidden),
            **tensors.linear(f"{block}.mlp.down_proj", hidden, inner),
        }
    return found


def build_qwen2_5_vl_vision(
    spec: StageSpec, vision: Qwen25Vision, dtype: str, target: str, weights: Weights
) -> ir.Model:
    """Build the vision graph for a target."""
    g = GraphBuilder(VISION, dtype, target, weights, WEIGHT_FILE)
    inputs = g.inputs(spec)
    dim, heads, merge = vision.hidden_size, vision.num_heads, vision.spatial_merge_size
    head_dim = dim // heads
    pixels = inputs["pixel_values"]
    frames = g.op("Shape", pixels, start=0, end=1, name="num_frames")
    cos, sin = rotary_tables(g, inputs["patch_positions"], vision)
    with g.scope("windows"):
        windows = _windows(g, inputs, frames, cos, sin, heads, head_dim)
    with g.scope("frames"):
        frame_len = g.op("Shape", pixels, start=1, end=2, name="frame_len")
        whole = _frames(g, frame_len, frames, cos, sin, heads, head_dim)
    x = patch_embed(g, pixels, vision)
    tokens, queries = token_tiles(g, x), query_tiles(g, pixels)
    full = set(vision.fullatt_block_indexes)
    for block in range(vision.depth):
        x = _block(g, x, frames, (tokens, queries), whole if block in full else windows, block, vision)
    with g.scope("merger"):
        h = rms_norm(g, x, "visual.merger.ln_q", _NORM_EPSILON, "ln_q")
        h = g.reshape(h, -1, dim * merge**2, name="merge")
        h = merger(g, h, "visual.merger.mlp.0", "visual.merger.mlp.2")
        by_frame_shape = g.op("Concat", frames, g.ints(-1, vision.out_hidden_size), axis=0, name="by_frame_shape")
        by_frame = g.op("Reshape", h, by_frame_shape, name="by_frame")
        raster = g.op("Gather", by_frame, inputs["merge_order"], axis=1, name="raster_order")
        embeds = g.reshape(raster, -1, vision.out_hidden_size, name="visual_embeds")
    g.outputs(spec, {"visual_embeds": embeds})
    return g.model()


def _windows(
    g: GraphBuilder,
    inputs: dict[str, ir.Value],
    frames: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: int,
    head_dim: int,
) -> _Segments:
    """Segments of the windowed layers."""
    index = inputs["window_index"]
    window_len = g.op("Shape", index, start=1, end=2, name="window_len")
    shape = g.op("Concat", g.ints(-1), window_len, g.ints(heads, head_dim), axis=0, name="segment_shape")

    def of_all_frames(x: ir.Value, name: str) -> ir.Value:
        """[windows, ..] -> [frames * windows, ..]."""
        to = g.op("Concat", frames, g.op("Shape", x, name=f"{name}_shape"), axis=0, name=f"{name}_all_shape")
        flat = g.op("Concat", g.ints(-1), g.op("Shape", x, start=1, name=f"{name}_rest"), axis=0, name=f"{name}_flat")
        return g.op("Reshape", g.op("Expand", x, to, name=f"{name}_all"), flat, name=f"{name}_of_all_frames")

    cos, sin = (
        of_all_frames(g.op("Gather", table, index, axis=0, name=f"{name}_by_window"), name)  # [windows, len, dim / 2]
        for table, name in ((cos, "cos"), (sin, "sin"))
    )
    seen = g.unsqueeze(inputs["window_mask"], 1, 2, name="mask_rows")  # [windows, 1, 1, len]
    if g.opset24:  # the operator wants a row for every query
        square = g.op("Concat", g.ints(1, 1), window_len, g.ints(1), axis=0, name="square")
        mask = of_all_frames(g.op("Expand", seen, square, name="mask_square"), "mask")
    else:
        mask = of_all_frames(mask_bias(g, seen), "bias")
    return _Segments(cos, sin, shape, mask, index, inputs["window_slot"])


def _frames(
    g: GraphBuilder, frame_len: ir.Value, frames: ir.Value, cos: ir.Value, sin: ir.Value, heads: int, head_dim: int
) -> _Segments:
    """Segments of the full-attention layers: the frames."""
    shape = g.op("Concat", g.ints(-1), frame_len, g.ints(heads, head_dim), axis=0, name="segment_shape")
    to = g.op("Concat", frames, frame_len, g.ints(head_dim // 2), axis=0, name="table_shape")
    cos, sin = (g.op("Expand", table, to, name=name) for table, name in ((cos, "cos"), (sin, "sin")))
    return _Segments(cos, sin, shape, None, None, None)


def _block(
    g: GraphBuilder,
    x: ir.Value,
    frames: ir.Value,
    tiles: tuple[Tiles, Tiles],
    segments: _Segments,
    block: int,
    vision: Qwen25Vision,
) -> ir.Value:
    """One block. x: [num_frames * num_patches, dim], residual dtype; tiles: of tokens and of a frame's queries."""
    weight = f"visual.blocks.{block}"
    dim = vision.hidden_size
    tokens, queries = tiles
    with g.scope(f"blocks.{block}"):
        h = rms_norm(g, x, f"{weight}.norm1", _NORM_EPSILON, "norm1")
        with g.scope("attn"):
            parts = query_key_value(g, tokens, h, f"{weight}.attn.qkv", dim)
            if segments.index is not None:
                by_frame = g.op("Concat", frames, g.ints(-1, dim), axis=0, name="by_frame_shape")
                parts = [g.op("Reshape", part, by_frame, name="by_frame") for part in parts]
                parts = [g.op("Gather", part, segments.index, axis=1, name="by_window") for part in parts]
            out = _segment_attention(g, parts, segments, queries, vision.num_heads, dim // vision.num_heads)
            if segments.slot is not None:
                slots = g.op("Concat", frames, g.ints(-1, dim), axis=0, name="slots_shape")
                out = g.op("Reshape", out, slots, name="slots")
                out = g.op("Gather", out, segments.slot, axis=1, name="by_patch")
            out = linear(g, g.reshape(out, -1, dim, name="flat"), f"{weight}.attn.proj", "proj")
        x = add_residual(g, x, out, "add_attention")
        h = rms_norm(g, x, f"{weight}.norm2", _NORM_EPSILON, "norm2")
        (h,) = tokens.run(h, lambda tile: [gated_mlp(g, tile, f"{weight}.mlp")], [dim])
        return g.op("Add", x, h, name="add_mlp")


def _segment_attention(
    g: GraphBuilder, parts: Sequence[ir.Value], segments: _Segments, tiles: Tiles, heads: int, head_dim: int
) -> ir.Value:
    """Attention inside each segment: three of [tokens, dim] or [frames, windows, len, dim] -> [segments, len, dim]."""
    by_segment = [g.op("Reshape", part, segments.shape, name="segments") for part in parts]
    query, key, value = (g.transpose(part, 0, 2, 1, 3, name="by_head") for part in by_segment)
    query, key = (rotary_float32(g, part, segments.cos, segments.sin, "rotary") for part in (query, key))
    if segments.mask is None:
        out = frame_attention(g, tiles, [query, key, value], heads, head_dim)
    else:
        out = attention(g, query, key, value, float(head_dim**-0.5), segments.mask)
    return g.transpose(out, 0, 2, 1, 3, name="join_heads")
