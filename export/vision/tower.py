"""The vision tower of the Qwen families: patches embedded, then blocks of attention inside segments and an MLP.

In: frames of one size, [num_frames, num_patches, patch_dim]. Token-wise ops run on [num_frames * num_patches, dim],
attention on segments: whole frames, or Qwen2.5-VL's windows. All frames share positions and windows, so a whole frame
needs neither gather nor mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from hawk_trt.models.vision_config import Qwen2Vision

from ..graph import GraphBuilder, Value
from ..layers import add_residual, attention, linear, rotary_float32, wide_linear
from .activations import gelu
from .tiles import frame_attention, query_tiles, token_tiles

_NORM_EPSILON = 1e-6
_PROJ = "visual.patch_embed.proj"


# [tokens, dim] in the model's dtype -> the same in the residual's, of the weights below a name, dim and inner size
Mlp: TypeAlias = Callable[[GraphBuilder, Value, str, int, int], Value]


@dataclass(frozen=True, slots=True)
class Style:
    """How a family makes its blocks."""

    norm: Callable[[GraphBuilder, Value, str, int, float], Value]  # layer_norm or rms_norm
    mlp: Mlp
    merger_layers: tuple[str, str, str]  # names of its norm and its two linear layers
    patch_bias: bool = False  # whether the patch embedding has one


def plain_mlp(first: str, second: str, activation: Callable[[GraphBuilder, Value], Value]) -> Mlp:
    """An MLP of two layers of these names with the activation between."""

    def mlp(g: GraphBuilder, x: Value, weight: str, dim: int, inner: int) -> Value:
        with g.scope("mlp"):
            h = activation(g, linear(g, x, f"{weight}.{first}", (inner, dim)))
            return wide_linear(g, h, f"{weight}.{second}", (dim, inner))

    return mlp


@dataclass(frozen=True, slots=True)
class Segments:
    """How blocks cut the patches into attention segments."""

    cos: Value
    sin: Value  # float32 [segments, segment_len, head_dim / 2]
    shape: Value  # int64 [4], (segments, segment_len, heads, head_dim)
    # bool [segments, 1, len, len], without opset 24 additive [segments, 1, 1, len]; None for whole frames
    mask: Value | None = None
    index: Value | None = None  # int64 [num_windows, window_len] to gather by, None where a segment is a whole frame
    slot: Value | None = None  # int64 [num_patches], where to find each patch again


class Tower:
    """What all blocks of a graph share.

    Attributes:
        frames: int64 [1], how many there are.
        cos, sin: float32 [num_patches, head_dim / 2].
        whole: the segments that are whole frames.
        patches: the embedded patches, [num_frames * num_patches, dim] in the residual dtype.
    """

    def __init__(self, g: GraphBuilder, vision: Qwen2Vision, style: Style) -> None:
        self._g, self._vision, self._style, pixels = g, vision, style, g.inputs["pixel_values"]
        self._dim, self._heads = vision.hidden_size, vision.num_heads
        self._head_dim = self._dim // self._heads
        kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        g.expect(f"{_PROJ}.weight", self._dim, *kernel)  # before tables as large as a size that is made up
        self.cos, self.sin = _rotary_tables(g, g.inputs["patch_positions"], vision)
        with g.scope("frames"):
            self.frames = g.op("Shape", pixels, start=0, end=1, name="num_frames")
            frame_shape = g.op("Shape", pixels, start=0, end=2, name="frame_shape")
            table_shape = g.op("Concat", frame_shape, g.ints(self._head_dim // 2), axis=0, name="table_shape")
            cos, sin = (
                g.op("Expand", table, table_shape, name=name) for table, name in ((self.cos, "cos"), (self.sin, "sin"))
            )
            self.whole = Segments(cos, sin, self.segment_shape(g.op("Shape", pixels, start=1, end=2, name="frame_len")))
        with g.scope("patch_embed"):
            flat = g.reshape(g.cast(pixels, "float32", g.dtype, "to_model"), -1, vision.patch_dim, name="flat_pixels")
            weight = g.weight(f"{_PROJ}.weight", self._dim, *kernel, flat=True)  # the convolution is one product
            bias = [g.weight(f"{_PROJ}.bias", self._dim)] if style.patch_bias else []
            x = g.op("Gemm", flat, weight, *bias, transB=1, name="proj")
            self.patches = g.cast(x, g.dtype, g.residual, "to_residual")
        self._tokens, self._queries = token_tiles(g, x), query_tiles(g, pixels)

    def segment_shape(self, segment_len: Value) -> Value:
        """int64 [4], (segments, segment_len, heads, head_dim)."""
        g = self._g
        return g.op(
            "Concat", g.ints(-1), segment_len, g.ints(self._heads, self._head_dim), axis=0, name="segment_shape"
        )

    def block(self, x: Value, number: int, segments: Segments | None = None) -> Value:
        """One block, over whole frames unless segments say otherwise. x: as patches."""
        g, style, dim, weight = self._g, self._style, self._dim, f"visual.blocks.{number}"
        with g.scope(f"blocks.{number}"):
            h = style.norm(g, x, f"{weight}.norm1", dim, _NORM_EPSILON)
            with g.scope("attn"):
                parts = self._tokens.run(h, lambda tile: self._query_key_value(tile, f"{weight}.attn.qkv"), [dim] * 3)
                attended = self._attention(parts, segments or self.whole)
                h = g.reshape(attended, -1, dim, name="flat")
                h = linear(g, h, f"{weight}.attn.proj", (dim, dim))
            x = add_residual(g, x, h, "add_attention")
            h = style.norm(g, x, f"{weight}.norm2", dim, _NORM_EPSILON)
            inner = self._vision.intermediate_size
            (h,) = self._tokens.run(h, lambda tile: [style.mlp(g, tile, f"{weight}.mlp", dim, inner)], [dim])
            return g.op("Add", x, h, name="add_mlp")

    def merge(self, x: Value, name: str, *, norm_merged: bool = False) -> Value:
        """Patches to tokens by the merger of a name: [num_visual, out_hidden_size].

        norm_merged: norm behind the joining of the patches of a block, not before. x: as patches.
        """
        g, vision, weight = self._g, self._vision, f"visual.{name}"
        merged = self._dim * vision.spatial_merge_size**2
        norm, first, second = self._style.merger_layers
        with g.scope(name):
            h = g.reshape(x, -1, merged, name="merge") if norm_merged else x
            size = merged if norm_merged else self._dim
            h = self._style.norm(g, h, f"{weight}.{norm}", size, _NORM_EPSILON)
            h = h if norm_merged else g.reshape(h, -1, merged, name="merge")
            h = gelu(g, linear(g, h, f"{weight}.{first}", (merged, merged), name="first"))
            return linear(g, h, f"{weight}.{second}", (vision.out_hidden_size, merged), name="second")

    def _query_key_value(self, tile: Value, weight: str) -> Sequence[Value]:
        """The joined projection cut in three, each [rows, dim]."""
        joined = linear(self._g, tile, weight, (3 * self._dim, self._dim))
        return self._g.ops("Split", joined, axis=1, num_outputs=3, count=3, name="split_qkv")

    def _attention(self, parts: Sequence[Value], segments: Segments) -> Value:
        """Attention inside each segment: three of [num_frames * num_patches, dim] -> values in the same order."""
        g, heads, head_dim = self._g, self._heads, self._head_dim
        if segments.index is not None:
            by_frame = g.op("Concat", self.frames, g.ints(-1, self._dim), axis=0, name="by_frame_shape")
            parts = [g.op("Reshape", part, by_frame, name="by_frame") for part in parts]
            parts = [g.op("Gather", part, segments.index, axis=1, name="by_window") for part in parts]
        split = [g.op("Reshape", part, segments.shape, name="segments") for part in parts]
        query, key, value = (g.transpose(part, 0, 2, 1, 3, name="by_head") for part in split)
        query, key = (rotary_float32(g, part, segments.cos, segments.sin, "rotary") for part in (query, key))
        if segments.mask is None:
            out = frame_attention(g, self._queries, [query, key, value], heads, head_dim)
        else:
            out = attention(g, query, key, value, float(head_dim**-0.5), segments.mask)
        out = g.transpose(out, 0, 2, 1, 3, name="join_heads")
        if segments.slot is None:
            return out
        slots = g.op("Concat", self.frames, g.ints(-1, self._dim), axis=0, name="slots_shape")
        return g.op("Gather", g.op("Reshape", out, slots, name="slots"), segments.slot, axis=1, name="by_patch")


def _rotary_tables(g: GraphBuilder, positions: Value, vision: Qwen2Vision) -> tuple[Value, Value]:
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
