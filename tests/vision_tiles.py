"""Holds a family's vision graph in tiles of tokens against the same graph without the loop, as TensorRT gets it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from engines.prepare import DECOMPOSABLE, prepare
from export.__main__ import main as export
from export.vision import token_tiles
from hawk_trt.bundle import Bundle
from hawk_trt.models.family import Patches
from hawk_trt.models.registry import family_by_name
from hawk_trt.request import ModelInputs
from hawk_trt.stages import PROFILES

TILE = 10


def assert_tiles_compute_the_same(
    checkpoint: Path, folder: Path, inputs: ModelInputs, monkeypatch, *options: str
) -> None:
    """Both profiles, in tiles so small that the last one is not full, within float32's rounding."""
    monkeypatch.setattr(token_tiles, "TILE", TILE)
    assert export([str(checkpoint), "--out", str(folder), *options]) == 0
    bundle = Bundle.load(folder)
    patches = Patches(inputs.pixel_values, np.array(inputs.image_grid_thw))
    feeds = next(family_by_name(bundle.manifest.family)(bundle.manifest.vision).vision_feeds(patches, 10_000))
    tokens = feeds["pixel_values"].shape[0] * feeds["pixel_values"].shape[1]
    tiles = -(-tokens // TILE)
    assert tiles > 2 and tokens % -(-tokens // tiles), tokens  # several, the last one filled up
    for profile in PROFILES:
        path = folder / f"vision.{profile}.onnx"
        in_tiles = onnx.load(path, load_external_data=False)
        loops = [node for node in in_tiles.graph.node if node.op_type == "Scan"]
        assert len(loops) == 2 * bundle.manifest.vision.depth
        whole = onnx.load_from_string(prepare(bundle, "vision", profile, max_context=64, plugin=False).content)
        assert not {node.op_type for node in whole.graph.node} & {"Scan", "Pad"}
        assert not [node.name for node in whole.graph.node if node.name.startswith(token_tiles.SCOPE)]
        for node in whole.graph.node:
            for attribute in [entry for entry in node.attribute if entry.name == DECOMPOSABLE]:
                node.attribute.remove(attribute)
        onnx.save(whole, folder / "whole.onnx")
        expected, got = (
            ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feeds)
            for file in (folder / "whole.onnx", path)
        )
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=profile)
