"""Vision graph of Qwen3-VL: frames of one size in, visual tokens and DeepStack's features of them out.

A learned table of positions is added to the patches, resampled by the places and weights that the host gives. Behind
some blocks a merger of its own makes features that the language model's first layers add.
"""

from dataclasses import replace

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import Qwen3Vision

from ..contract import deepstack_embeds
from ..graph import GraphBuilder, Value
from ..layers import layer_norm
from .activations import gelu_tanh
from .qwen2_vl import qwen2_vl_entry
from .tower import Style, Tower, plain_mlp

_LAYERS = ("linear_fc1", "linear_fc2")
_STYLE = Style(layer_norm, plain_mlp(*_LAYERS, gelu_tanh), ("norm", *_LAYERS), patch_bias=True)


def qwen3_vl_entry(vision: Qwen3Vision, dtype: str, target: str) -> GraphEntry:
    """Inputs and outputs of the graph: Qwen2-VL's, the places in the table of positions, and DeepStack's features."""
    entry, levels = qwen2_vl_entry(vision, dtype, target), len(vision.deepstack_visual_indexes)
    places = (
        TensorEntry("place_index", "int64", ("num_patches", 4)),
        TensorEntry("place_weight", "float32", ("num_patches", 4)),
    )
    outputs = (*entry.outputs, *deepstack_embeds(levels, vision.out_hidden_size, dtype))
    return replace(entry, inputs=(*entry.inputs, *places), outputs=outputs)


def qwen3_vl_vision(g: GraphBuilder, vision: Qwen3Vision) -> dict[str, Value]:
    tower = Tower(g, vision, _STYLE)
    x = _add_places(g, tower.patches, vision)
    levels: list[Value] = []
    for number in range(vision.depth):
        x = tower.block(x, number)
        if number in vision.deepstack_visual_indexes:
            name = f"deepstack_merger_list.{len(levels)}"
            features = tower.merge(x, name, norm_merged=True)
            with g.scope(name):
                levels.append(g.unsqueeze(features, 1, name="level"))
    outputs = {"visual_embeds": tower.merge(x, "merger")}
    if levels:
        outputs["deepstack_embeds"] = g.op("Concat", *levels, axis=1, name="deepstack_embeds")
    return outputs


def _add_places(g: GraphBuilder, x: Value, vision: Qwen3Vision) -> Value:
    """Add the resampled table of positions to every frame. x: [num_frames * num_patches, dim], residual dtype."""
    dim = vision.hidden_size
    with g.scope("pos_embed"):
        table = g.weight("visual.pos_embed.weight", vision.num_position_embeddings, dim)
        rows = g.op("Gather", table, g.inputs["place_index"], axis=0, name="neighbours")
        rows = g.cast(rows, g.dtype, "float32", "neighbours_float32")  # [num_patches, 4, dim]
        weighted = g.op("Mul", rows, g.unsqueeze(g.inputs["place_weight"], 2, name="weights"), name="weighted")
        places = g.op("ReduceSum", weighted, g.ints(1), keepdims=0, name="places")  # [num_patches, dim]
        by_frame = g.op("Shape", g.inputs["pixel_values"], start=0, end=2, name="frame_shape")
        by_frame = g.op("Concat", by_frame, g.ints(dim), axis=0, name="by_frame_shape")
        frames = g.op("Reshape", x, by_frame, name="by_frame")
        placed = g.op("Add", frames, g.cast(places, "float32", g.residual, "places_residual"), name="add_places")
        return g.reshape(placed, -1, dim, name="flat")
