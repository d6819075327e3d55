"""Vision graph of Qwen3-VL: frames of one size in, visual tokens and DeepStack's features of them out.

A learned table of positions is added to the patches, resampled by the places and weights that the host gives. Behind
some blocks a merger of its own makes features that the language model's first layers add.
"""

from dataclasses import replace

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import Qwen3Vision

from .. import tensors
from ..contract import deepstack_embeds
from ..graph import GraphBuilder, Value
from ..layers import layer_norm
from ..tensors import Shapes
from .activations import gelu_tanh
from .qwen2_vl import qwen2_vl_entry
from .tower import NORM_EPSILON, Tower, merger, plain_style, tower_shapes

_STYLE = plain_style("linear_fc1", "linear_fc2", gelu_tanh)


def qwen3_vl_entry(vision: Qwen3Vision, dtype: str, target: str) -> GraphEntry:
    """Inputs and outputs of the graph: Qwen2-VL's, the places in the table of positions, and DeepStack's features."""
    entry, levels = qwen2_vl_entry(vision, dtype, target), len(vision.deepstack_visual_indexes)
    places = (
        TensorEntry("place_index", "int64", ("num_patches", 4)),
        TensorEntry("place_weight", "float32", ("num_patches", 4)),
    )
    outputs = (*entry.outputs, *deepstack_embeds(levels, vision.out_hidden_size, dtype))
    return replace(entry, inputs=(*entry.inputs, *places), outputs=outputs)


def qwen3_vl_shapes(vision: Qwen3Vision) -> Shapes:
    """Names and shapes of all tensors of the vision tower."""
    dim, out = vision.hidden_size, vision.out_hidden_size
    merged = dim * vision.spatial_merge_size**2
    mergers = [f"visual.deepstack_merger_list.{level}" for level in range(len(vision.deepstack_visual_indexes))]
    found = tower_shapes(vision, _STYLE, patch_bias=True)
    found["visual.pos_embed.weight"] = (vision.num_position_embeddings, dim)
    for name, norm_size in (("visual.merger", dim), *((level, merged) for level in mergers)):
        found |= tensors.norm(f"{name}.norm", norm_size)
        found |= tensors.linear(f"{name}.linear_fc1", merged, merged)
        found |= tensors.linear(f"{name}.linear_fc2", out, merged)
    return found


def qwen3_vl_vision(g: GraphBuilder, vision: Qwen3Vision) -> dict[str, Value]:
    """Add the nodes of the vision graph."""
    tower = Tower(g, vision, _STYLE)
    x = _add_places(g, tower.patches, vision.hidden_size)
    levels: list[Value] = []
    for number in range(vision.depth):
        x = tower.block(x, number)
        if number in vision.deepstack_visual_indexes:
            name = f"deepstack_merger_list.{len(levels)}"
            with g.scope(name):
                features = _merger(g, x, f"visual.{name}", vision, norm_merged=True)
                levels.append(g.unsqueeze(features, 1, name="level"))
    with g.scope("merger"):
        outputs = {"visual_embeds": _merger(g, x, "visual.merger", vision, norm_merged=False)}
    if levels:
        outputs["deepstack_embeds"] = g.op("Concat", *levels, axis=1, name="deepstack_embeds")
    return outputs


def _add_places(g: GraphBuilder, x: Value, dim: int) -> Value:
    """Add the resampled table of positions to every frame. x: [num_frames * num_patches, dim], residual dtype."""
    with g.scope("pos_embed"):
        rows = g.op("Gather", g.weight("visual.pos_embed.weight"), g.inputs["place_index"], axis=0, name="neighbours")
        rows = g.cast(rows, g.dtype, "float32", "neighbours_float32")  # [num_patches, 4, dim]
        weighted = g.op("Mul", rows, g.unsqueeze(g.inputs["place_weight"], 2, name="weights"), name="weighted")
        places = g.op("ReduceSum", weighted, g.ints(1), keepdims=0, name="places")  # [num_patches, dim]
        by_frame = g.op("Shape", g.inputs["pixel_values"], start=0, end=2, name="frame_shape")
        by_frame = g.op("Concat", by_frame, g.ints(dim), axis=0, name="by_frame_shape")
        frames = g.op("Reshape", x, by_frame, name="by_frame")
        placed = g.op("Add", frames, g.cast(places, "float32", g.residual, "places_residual"), name="add_places")
        return g.reshape(placed, -1, dim, name="flat")


def _merger(g: GraphBuilder, x: Value, weight: str, vision: Qwen3Vision, *, norm_merged: bool) -> Value:
    """Patches to tokens, [num_visual, hidden], normed before the patches of a block are joined or after."""
    merged = vision.hidden_size * vision.spatial_merge_size**2
    h = g.reshape(x, -1, merged, name="merge") if norm_merged else x
    h = layer_norm(g, h, f"{weight}.norm", NORM_EPSILON, "norm")
    h = h if norm_merged else g.reshape(h, -1, merged, name="merge")
    return merger(g, h, f"{weight}.linear_fc1", f"{weight}.linear_fc2")
