"""The vision towers without windows, Qwen2-VL's and Qwen3-VL's: every block attends over whole frames.

In: frames of one size, [num_frames, num_patches, patch_dim], patches in the processor's order, where the patches of a
merge block follow each other. All frames share positions, so they are a batch and need no mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hawk_trt.models.vision_config import Qwen2Vision

from .. import tensors
from ..graph import GraphBuilder
from ..layers import add_residual, layer_norm, linear, rotary_float32, wide_linear
from ..tensors import Shapes
from ..vision.activations import gelu
from ..vision.tiles import Tiles, frame_attention, query_key_value, query_tiles, token_tiles

NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Frames:
    """What all blocks share.

    Attributes:
        cos, sin: float32 [num_frames, num_patches, head_dim / 2].
        shape: int64 [4], (num_frames, num_patches, heads, head_dim).
        heads: number of heads.
        head_dim: size of each.
        tokens, queries: tiles of token-wise parts and of attention.
    """

    cos: ir.Value
    sin: ir.Value
    shape: ir.Value
    heads: int
    head_dim: int
    tokens: Tiles
    queries: Tiles


@dataclass(frozen=True, slots=True)
class Mlp:
    """How a family's MLP names its two layers, and what lies between them."""

    first: str
    second: str
    activation: Callable[[GraphBuilder, ir.Value], ir.Value]


def frames(g: GraphBuilder, inputs: dict[str, ir.Value], vision: Qwen2Vision, x: ir.Value) -> Frames:
    """Build the shared values. x: the embedded patches, [num_frames * num_patches, dim]."""
    heads, pixels = vision.num_heads, inputs["pixel_values"]
    head_dim = vision.hidden_size // heads
    tables = rotary_tables(g, inputs["patch_positions"], vision)
    with g.scope("frames"):
        frame_shape = g.op("Shape", pixels, start=0, end=2, name="frame_shape")
        table_shape = g.op("Concat", frame_shape, g.ints(head_dim // 2), axis=0, name="table_shape")
        cos, sin = (
            g.op("Expand", table, table_shape, name=name) for table, name in zip(tables, ("cos", "sin"), strict=True)
        )
        shape = g.op("Concat", frame_shape, g.ints(heads, head_dim), axis=0, name="qkv_shape")
    return Frames(cos, sin, shape, heads, head_dim, token_tiles(g, x), query_tiles(g, pixels))


def rotary_tables(g: GraphBuilder, positions: ir.Value, vision: Qwen2Vision) -> tuple[ir.Value, ir.Value]:
    """Cos and sin, float32 [num_patches, head_dim / 2]: the row's angles, then the column's.

    positions: int64 [num_patches, 2], row and column.
    """
    half = vision.hidden_size // vision.num_heads // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    inv_freq = (1.0 / np.float32(vision.rope_theta) ** exponents).astype(np.float32)
    with g.scope("rotary_tables"):
        places = g.unsqueeze(g.cast(positions, "int64", "float32", "float32"), 2, name="places")  # [num_patches, 2, 1]
        angles = g.op("Mul", places, g.const(inv_freq, "float32"), name="angles_by_axis")
        angles = g.reshape(angles, 0, half, name="angles")
        return g.op("Cos", angles, name="cos"), g.op("Sin", angles, name="sin")


def patch_embed(g: GraphBuilder, pixels: ir.Value, vision: Qwen2Vision) -> ir.Value:
    """pixel_values -> [num_frames * num_patches, dim] in the residual dtype; the convolution is one product."""
    dim, patch_dim = vision.hidden_size, vision.patch_dim
    with g.scope("patch_embed"):
        flat = g.reshape(g.cast(pixels, "float32", g.dtype, "to_model"), -1, patch_dim, name="flat_pixels")
        weight = "visual.patch_embed.proj"
        bias = [g.weight(f"{weight}.bias")] if g.has_weight(f"{weight}.bias") else []
        x = g.op("Gemm", flat, g.weight(f"{weight}.weight", (dim, patch_dim)), *bias, transB=1, name="proj")
        return g.cast(x, g.dtype, g.residual, "to_residual")


def block(g: GraphBuilder, x: ir.Value, shared: Frames, number: int, mlp: Mlp) -> ir.Value:
    """One block. x: [num_frames * num_patches, dim], residual dtype."""
    weight = f"visual.blocks.{number}"
    dim = shared.heads * shared.head_dim

    def feed_forward(tile: ir.Value) -> Sequence[ir.Value]:
        with g.scope("mlp"):
            inner = mlp.activation(g, linear(g, tile, f"{weight}.mlp.{mlp.first}", mlp.first))
            return [wide_linear(g, inner, f"{weight}.mlp.{mlp.second}", mlp.second)]

    with g.scope(f"blocks.{number}"):
        h = layer_norm(g, x, f"{weight}.norm1", NORM_EPSILON, "norm1")
        with g.scope("attn"):
            out = _attention(g, query_key_value(g, shared.tokens, h, f"{weight}.attn.qkv", dim), shared)
            out = linear(g, out, f"{weight}.attn.proj", "proj")
        x = add_residual(g, x, out, "add_attention")
        h = layer_norm(g, x, f"{weight}.norm2", NORM_EPSILON, "norm2")
        (h,) = shared.tokens.run(h, feed_forward, [dim])
        return g.op("Add", x, h, name="add_mlp")


def merger(g: GraphBuilder, h: ir.Value, first: str, second: str) -> ir.Value:
    """gelu(h W1) W2 of merged patches. h: [num_visual, dim * merge^2]; first, second: names of the layers."""
    h = linear(g, h, first, "first")
    return linear(g, gelu(g, h), second, "second")


def tower_shapes(vision: Qwen2Vision, mlp: Mlp, *, patch_bias: bool) -> Shapes:
    """Names and shapes of the tensors of patch embedding and blocks."""
    dim, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    proj = "visual.patch_embed.proj"
    found: Shapes = {
        f"{proj}.weight": (dim, vision.in_channels, vision.temporal_patch_size, patch, patch),
    }
    if patch_bias:
        found[f"{proj}.bias"] = (dim,)
    for number in range(vision.depth):
        weight = f"visual.blocks.{number}"
        found |= {
            **tensors.layer_norm(f"{weight}.norm1", dim),
            **tensors.layer_norm(f"{weight}.norm2", dim),
            **tensors.linear(f"{weight}.attn.qkv", 3 * dim, dim),
            **tensors.linear(f"{weight}.attn.proj", dim, dim),
            **tensors.linear(f"{weight}.mlp.{mlp.first}", inner, dim),
            **tensors.linear(f"{weight}.mlp.{mlp.second}", dim, inner),
        }
    return found


def _attention(g: GraphBuilder, parts: Sequence[ir.Value], shared: Frames) -> ir.Value:
    """Attention inside each frame: three of [num_frames * num_patches, dim] -> [num_frames * num_patches, dim]."""
    heads, head_dim = shared.heads, shared.head_dim
    by_frame = [g.op("Reshape", part, shared.shape, name="split") for part in parts]
    query, key, value = (g.transpose(part, 0, 2, 1, 3, name="by_head") for part in by_frame)
    query, key = (rotary_float32(g, part, shared.cos, shared.sin, "rotary") for part in (query, key))
    out = frame_attention(g, shared.queries, [query, key, value], heads, head_dim)
    joined = g.transpose(out, 0, 2, 1, 3, name="join_heads")
    return g.reshape(joined, -1, heads * head_dim, name="flat")
