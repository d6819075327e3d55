"""Vision graph of Qwen2-VL: frames of one size in, visual tokens out."""

import onnx_ir as ir

from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.stages import VISION, StageSpec

from .. import tensors
from ..graph import GraphBuilder, Weights
from ..layers import layer_norm
from ..tensors import Shapes
from ..vision import frame_tower
from ..vision.activations import quick_gelu

WEIGHT_FILE = f"{VISION}.data"
_MLP = frame_tower.Mlp("fc1", "fc2", quick_gelu)


def qwen2_vl_shapes(vision: Qwen2Vision) -> Shapes:
    """Names and shapes of all tensors of the vision tower."""
    dim = vision.hidden_size
    merged = dim * vision.spatial_merge_size**2
    return {
        **frame_tower.tower_shapes(vision, _MLP, patch_bias=False),
        **tensors.layer_norm("visual.merger.ln_q", dim),
        **tensors.linear("visual.merger.mlp.0", merged, merged),
        **tensors.linear("visual.merger.mlp.2", vision.out_hidden_size, merged),
    }


def build_qwen2_vl_vision(spec: StageSpec, vision: Qwen2Vision, dtype: str, target: str, weights: Weights) -> ir.Model:
    """Build the vision graph for a target."""
    g = GraphBuilder(VISION, dtype, target, weights, WEIGHT_FILE)
    inputs = g.inputs(spec)
    x = frame_tower.patch_embed(g, inputs["pixel_values"], vision)
    shared = frame_tower.frames(g, inputs, vision, x)
    for number in range(vision.depth):
        x = frame_tower.block(g, x, shared, number, _MLP)
    with g.scope("merger"):
        h = layer_norm(g, x, "visual.merger.ln_q", frame_tower.NORM_EPSILON, "ln_q")
        h = g.reshape(h, -1, vision.hidden_size * vision.spatial_merge_size**2, name="merge")
        embeds = frame_tower.merger(g, h, "visual.merger.mlp.0", "visual.merger.mlp.2")
    g.outputs(spec, {"visual_embeds": embeds})
    return g.model()
