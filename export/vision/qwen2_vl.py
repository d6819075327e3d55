"""Vision graph of Qwen2-VL: frames of one size in, visual tokens out."""

from hawk_trt.models.vision_config import Qwen2Vision

from .. import tensors
from ..contract import StageSpec, TensorSpec
from ..graph import GraphBuilder
from ..layers import layer_norm
from ..onnx_graph import Value
from ..tensors import Shapes
from .activations import quick_gelu
from .tower import NORM_EPSILON, Tower, merger, plain_style, tower_shapes

_STYLE = plain_style("fc1", "fc2", quick_gelu)


def qwen2_vl_spec(vision: Qwen2Vision) -> StageSpec:
    """Inputs and outputs of the graph.

    num_visual = num_frames * num_patches / merge^2, frames in order, merge blocks of a frame in raster order.
    """
    inputs = (
        TensorSpec("pixel_values", "float32", ("num_frames", "num_patches", vision.patch_dim)),
        TensorSpec("patch_positions", "int64", ("num_patches", 2)),
    )
    return StageSpec(inputs, (TensorSpec("visual_embeds", "model", ("num_visual", vision.out_hidden_size)),))


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


def qwen2_vl_vision(g: GraphBuilder, vision: Qwen2Vision, inputs: dict[str, Value]) -> dict[str, Value]:
    """Add the nodes of the vision graph."""
    tower = Tower(g, inputs, vision, _STYLE)
    x = tower.patches
    for number in range(vision.depth):
        x = tower.block(x, number)
    with g.scope("merger"):
        h = layer_norm(g, x, "visual.merger.ln_q", NORM_EPSILON, "ln_q")
        h = g.reshape(h, -1, vision.hidden_size * vision.spatial_merge_size**2, name="merge")
        return {"visual_embeds": merger(g, h, "visual.merger.mlp.0", "visual.merger.mlp.2")}
