"""Vision graph of InternVL3's and 3.5's InternViT: tiles in, visual tokens out.

Every tile is a sequence of its own, a class token and its patches, so attention needs no mask. Behind the last block
the class token goes, blocks of patches become one token (pixel shuffle), and the projector brings them to the language
model's width. Token-wise ops run on [num_tiles * (1 + patches), dim].
"""

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.stages import VISION

from ..contract import graph_entry
from ..graph import GraphBuilder, Value
from ..layers import add_residual, attention, layer_norm, linear, rms_norm
from .activations import gelu

# Neither is in config.json: of the norms of queries and keys, and of the projector.
_QK_EPSILON = 1e-6
_PROJECTOR_EPSILON = 1e-5


def internvl_entry(vision: InternVLVision, dtype: str, target: str) -> GraphEntry:
    """Inputs and outputs of the graph; num_visual counts the tokens of all tiles, tile after tile."""
    pixels = TensorEntry("pixel_values", "float32", ("num_tiles", 3, vision.image_size, vision.image_size))
    embeds = TensorEntry("visual_embeds", dtype, ("num_visual", vision.out_hidden_size))
    return graph_entry(VISION, target, (pixels,), (embeds,))


def internvl_vision(g: GraphBuilder, vision: InternVLVision) -> dict[str, Value]:
    x = _embed(g, vision, g.inputs["pixel_values"])
    for block in range(vision.depth):
        x = _block(g, vision, x, f"blocks.{block}")
    merged, out = vision.hidden_size * vision.spatial_merge_size**2, vision.out_hidden_size
    with g.scope("merger"):
        h = layer_norm(g, _pixel_shuffle(g, vision, x), "visual.merger.norm", merged, _PROJECTOR_EPSILON)
        h = gelu(g, linear(g, h, "visual.merger.linear_1", (out, merged)))
        return {"visual_embeds": linear(g, h, "visual.merger.linear_2", (out, out))}


def _embed(g: GraphBuilder, vision: InternVLVision, pixels: Value) -> Value:
    """[num_tiles, 3, side, side] float32 -> class token and patches, with positions: [tokens, dim], residual dtype."""
    dim, side, patch, channels = vision.hidden_size, vision.tile_patches, vision.patch_size, vision.in_channels
    tokens = side * side
    with g.scope("patch_embed"):
        x = g.cast(pixels, "float32", g.dtype, "to_model")
        x = g.reshape(x, -1, channels, side, patch, side, patch, name="patch_grid")
        x = g.transpose(x, 0, 2, 4, 1, 3, 5, name="by_patch")
        x = g.reshape(x, -1, channels * patch**2, name="flat_patches")
        weight = g.weight("visual.patch_embed.weight", dim, channels, patch, patch, flat=True)
        x = g.op("Gemm", x, weight, g.weight("visual.patch_embed.bias", dim), transB=1, name="proj")
        x = g.reshape(x, -1, tokens, dim, name="by_tile")
        one = g.op("Shape", x, start=0, end=1, name="num_tiles")
        cls_shape = g.op("Concat", one, g.ints(1, dim), axis=0, name="cls_shape")
        cls = g.op("Expand", g.weight("visual.cls_token", 1, 1, dim), cls_shape, name="cls_token")
        x = g.op("Concat", cls, x, axis=1, name="with_cls_token")
        x = g.op("Add", x, g.weight("visual.position_embeddings", 1, 1 + tokens, dim), name="add_positions")
        return g.cast(g.reshape(x, -1, dim, name="flat"), g.dtype, g.residual, "to_residual")


def _block(g: GraphBuilder, vision: InternVLVision, x: Value, block: str) -> Value:
    """One block. x: [num_tiles * (1 + patches), dim], residual dtype."""
    weight, dim, inner = f"visual.{block}", vision.hidden_size, vision.intermediate_size
    norm, epsilon = layer_norm if vision.norm == "layer_norm" else rms_norm, vision.layer_norm_eps
    with g.scope(block):
        h = norm(g, x, f"{weight}.norm1", dim, epsilon)
        with g.scope("attn"):
            h = _attention(g, vision, h, f"{weight}.attn")
        h = g.op("Mul", h, g.weight(f"{weight}.ls1", dim), name="ls1")
        x = add_residual(g, x, h, "add_attention")
        h = norm(g, x, f"{weight}.norm2", dim, epsilon)
        with g.scope("mlp"):
            h = gelu(g, linear(g, h, f"{weight}.mlp.fc1", (inner, dim)))
            h = linear(g, h, f"{weight}.mlp.fc2", (dim, inner))
        h = g.op("Mul", h, g.weight(f"{weight}.ls2", dim), name="ls2")
        return add_residual(g, x, h, "add_mlp")


def _attention(g: GraphBuilder, vision: InternVLVision, h: Value, weight: str) -> Value:
    """Attention inside each tile: [tokens, dim] -> [tokens, dim], model dtype."""
    dim, heads = vision.hidden_size, vision.num_heads
    head_dim, tokens = dim // heads, 1 + vision.tile_patches**2
    by_head = []
    for letter in "qkv":
        t = linear(g, h, f"{weight}.{letter}_proj", (dim, dim), bias=vision.qkv_bias)
        if vision.qk_norm and letter != "v":
            # over all heads at once
            t = rms_norm(g, t, f"{weight}.{letter}_norm", dim, _QK_EPSILON, g.dtype)
        t = g.reshape(t, -1, tokens, heads, head_dim, name=f"{letter}_split")
        by_head.append(g.transpose(t, 0, 2, 1, 3, name=f"{letter}_heads"))
    query, key, value = by_head
    out = attention(g, query, key, value, float(head_dim**-0.5))
    out = g.reshape(g.transpose(out, 0, 2, 1, 3, name="join_heads"), -1, dim, name="flat")
    return linear(g, out, f"{weight}.proj", (dim, dim))


def _pixel_shuffle(g: GraphBuilder, vision: InternVLVision, x: Value) -> Value:
    """Drop the class tokens and join blocks of merge x merge patches: [num_visual, merge^2 * dim], residual dtype."""
    dim, side, merge = vision.hidden_size, vision.tile_patches, vision.spatial_merge_size
    with g.scope("pixel_shuffle"):
        x = g.reshape(x, -1, 1 + side * side, dim, name="by_tile")
        x = g.cut(x, 1, 1, 1 + side * side, name="patches")
        x = g.reshape(x, -1, side // merge, merge, side // merge, merge, dim, name="blocks")
        x = g.transpose(x, 0, 1, 3, 2, 4, 5, name="by_block")
        return g.reshape(x, -1, merge * merge * dim, name="joined")
