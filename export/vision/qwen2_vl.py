"""Vision graph of Qwen2-VL: frames of one size in, visual tokens out."""

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.stages import VISION

from .. import tensors
from ..contract import graph_entry
from ..graph import GraphBuilder, Value
from ..layers import layer_norm
from ..tensors import Shapes
from .activations import quick_gelu
from .tower import NORM_EPSILON, Tower, merger, plain_style, tower_shapes

_STYLE = plain_style("fc1", "fc2", quick_gelu)


def qwen2_vl_entry(vision: Qwen2Vision, dtype: str, target: str) -> GraphEntry:
    """Inputs and outputs of the graph.

    num_visual = num_frames * num_patches / merge^2, frames in order, merge blocks of a frame in raster order.
    """
    inputs = (
        TensorEntry("pixel_values", "float32", ("num_frames", "num_patches", vision.patch_dim)),
        TensorEntry("patch_positions", "int64", ("num_patches", 2)),
    )
    embeds = TensorEntry("visual_embeds", dtype, ("num_visual", vision.out_hidden_size))
    return graph_entry(VISION, target, inputs, (embeds,))


def qwen2_vl_shapes(vision: Qwen2Vision) -> Shapes:
    """Names and shapes of all tensors of the vision tower."""
    dim = vision.hidden_size
    merged = dim * vision.spatial_merge_size**2
    return {
        **tower_shapes(vision, _STYLE),
        **tensors.norm("visual.merger.ln_q", dim),
        **tensors.linear("visual.merger.mlp.0", merged, merged),
        **tensors.linear("visual.merger.mlp.2", vision.out_hidden_size, merged),
    }


def qwen2_vl_vision(g: GraphBuilder, vision: Qwen2Vision) -> dict[str, Value]:
    """Add the nodes of the vision graph."""
    tower = Tower(g, vision, _STYLE)
    x = tower.patches
    for number in range(vision.depth):
        x = tower.block(x, number)
    with g.scope("merger"):
        h = layer_norm(g, x, "visual.merger.ln_q", NORM_EPSILON, "ln_q")
        h = g.reshape(h, -1, vision.hidden_size * vision.spatial_merge_size**2, name="merge")
        return {"visual_embeds": merger(g, h, "visual.merger.mlp.0", "visual.merger.mlp.2")}
