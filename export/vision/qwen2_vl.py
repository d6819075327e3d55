"""Vision graph of Qwen2-VL: frames of one size in, visual tokens out."""

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.stages import VISION

from ..contract import graph_entry
from ..graph import GraphBuilder, Value
from ..layers import layer_norm
from .activations import quick_gelu
from .tower import Style, Tower, plain_mlp

_STYLE = Style(layer_norm, plain_mlp("fc1", "fc2", quick_gelu), ("ln_q", "mlp.0", "mlp.2"))


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


def qwen2_vl_vision(g: GraphBuilder, vision: Qwen2Vision) -> dict[str, Value]:
    tower = Tower(g, vision, _STYLE)
    x = tower.patches
    for number in range(vision.depth):
        x = tower.block(x, number)
    return {"visual_embeds": tower.merge(x, "merger")}
