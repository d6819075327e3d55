"""Vision graph of Qwen2.5-VL: frames of one size in, visual tokens out.

Most blocks attend inside windows, the full-attention ones over whole frames.
"""

from dataclasses import replace
from functools import partial

from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.models.vision_config import Qwen25Vision

from ..graph import GraphBuilder, Value
from ..layers import gated_mlp, mask_bias, rms_norm
from .qwen2_vl import qwen2_vl_entry
from .tower import Segments, Style, Tower

_STYLE = Style(rms_norm, partial(gated_mlp, bias=True), ("ln_q", "mlp.0", "mlp.2"))


def qwen2_5_vl_entry(vision: Qwen25Vision, dtype: str, target: str) -> GraphEntry:
    """Inputs and outputs of the graph: Qwen2-VL's, and the plan of the windows."""
    entry = qwen2_vl_entry(vision, dtype, target)
    windows = (
        TensorEntry("window_index", "int64", ("num_windows", "window_len")),
        TensorEntry("window_mask", "bool", ("num_windows", "window_len")),
        TensorEntry("window_slot", "int64", ("num_patches",)),
    )
    return replace(entry, inputs=(*entry.inputs, *windows))


def qwen2_5_vl_vision(g: GraphBuilder, vision: Qwen25Vision) -> dict[str, Value]:
    tower = Tower(g, vision, _STYLE)
    with g.scope("windows"):
        windows = _windows(g, tower)
    x = tower.patches
    for number in range(vision.depth):
        x = tower.block(x, number, None if number in vision.fullatt_block_indexes else windows)
    return {"visual_embeds": tower.merge(x, "merger")}


def _windows(g: GraphBuilder, tower: Tower) -> Segments:
    """Segments of the windowed blocks."""
    index = g.inputs["window_index"]
    window_len = g.op("Shape", index, start=1, end=2, name="window_len")

    def of_all_frames(x: Value, name: str) -> Value:
        """[windows, ..] -> [frames * windows, ..]."""
        to = g.op("Concat", tower.frames, g.op("Shape", x, name=f"{name}_shape"), axis=0, name=f"{name}_all_shape")
        flat = g.op("Concat", g.ints(-1), g.op("Shape", x, start=1, name=f"{name}_rest"), axis=0, name=f"{name}_flat")
        return g.op("Reshape", g.op("Expand", x, to, name=f"{name}_all"), flat, name=f"{name}_of_all_frames")

    cos, sin = (
        of_all_frames(g.op("Gather", table, index, axis=0, name=f"{name}_by_window"), name)  # [windows, len, dim / 2]
        for table, name in ((tower.cos, "cos"), (tower.sin, "sin"))
    )
    seen = g.unsqueeze(g.inputs["window_mask"], 1, 2, name="mask_rows")  # [windows, 1, 1, len]
    if g.opset24:  # the operator wants a row for every query
        square = g.op("Concat", g.ints(1, 1), window_len, g.ints(1), axis=0, name="square")
        mask = of_all_frames(g.op("Expand", seen, square, name="mask_square"), "mask")
    else:
        mask = of_all_frames(mask_bias(g, seen), "bias")
    return Segments(cos, sin, tower.segment_shape(window_len), mask, index, g.inputs["window_slot"])
