"""Holds a family's vision graph in tiles, as the CPU runs it, against the graphs of the targets that have no loops."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from export.__main__ import main as export
from export.vision import tiles
from hawk_trt.bundle import Bundle
from hawk_trt.models import load_family
from hawk_trt.models.family import Patches
from hawk_trt.request import ModelInputs
from hawk_trt.stages import CPU, CUDA, PORTABLE, TENSORRT

TILE = 10


def assert_tiles_compute_the_same(
    checkpoint: Path, folder: Path, inputs: ModelInputs, monkeypatch, *options: str
) -> None:
    """Within float32's rounding, in tiles so small that the last one is not full."""
    monkeypatch.setattr(tiles, "TOKENS", TILE)
    monkeypatch.setattr(tiles, "QUERIES", TILE)
    assert export([str(checkpoint), "--out", str(folder), *options]) == 0
    bundle = Bundle.load(folder)
    patches = Patches(inputs.pixel_values, np.array(inputs.image_grid_thw))
    feeds = next(load_family(bundle.manifest.vision).vision_feeds(patches, 10_000))
    frames, frame_len = feeds["pixel_values"].shape[:2]
    for rows in (frames * frame_len, frame_len):
        count = -(-rows // TILE)
        assert count > 2 and rows % -(-rows // count), rows  # several, the last one filled up

    def graph(target):
        return onnx.load(folder / f"vision.{target}.onnx", load_external_data=False).graph

    def run(target):
        return ort.InferenceSession(folder / f"vision.{target}.onnx").run(None, feeds)

    vision = bundle.manifest.vision
    whole = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    loops = [node for node in graph(CPU).node if node.op_type == "Scan"]
    assert len(loops) == 2 * vision.depth + whole
    got = run(CPU)
    for target in (CUDA, TENSORRT, PORTABLE):
        assert not {node.op_type for node in graph(target).node} & {"Scan", "Pad", "Loop"}
        for one, other in zip(got, run(target), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=target)
