"""Large images in bounded memory: the vision stage grows with the patches and first_layer with the tokens, not squared.

Widths are small here, so that a square of patches or tokens would be most of the memory; the 7B's real width is
measured by `make bench-native`.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from checkpoints import Sizes, make_checkpoint
from export.__main__ import main as export
from hawk_trt import ModelInputs
from vision_tiles import assert_tiles_compute_the_same

SIZES = Sizes(64, 96, 2, 4, 2, 320, 32, 48, 2, 2, (1,))

# Memory of a process of its own, grown by one image of so many patches on a side: at its peak, and what stays.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from hawk_trt import ModelInputs, Pipeline, PruningConfig

def memory_mb(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name + ":")) / 1024

bundle, target, side, frames = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipe = Pipeline.load(bundle, target=target)
special = pipe.bundle.manifest.special_tokens
num_visual = frames * side * side // 4
pixels = np.random.default_rng(0).standard_normal((frames * side * side, 1176), dtype=np.float32)
ids = [3, special.vision_start, *[special.image] * num_visual, special.vision_end, 7, 8, 9]
inputs = ModelInputs(input_ids=ids, pixel_values=pixels, image_grid_thw=[[1, side, side]] * frames)
peak, resident = memory_mb("VmHWM"), memory_mb("VmRSS")
result = pipe.generate(inputs, pruning=PruningConfig(keep_ratio=0.1), max_new_tokens=2, ignore_eos=True)
print(json.dumps({"num_kept": result.num_kept, "finite": bool(np.isfinite(result.scores).all()),
                  "grown_mb": memory_mb("VmHWM") - peak, "held_mb": memory_mb("VmRSS") - resident}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("native"), SIZES)


def make_bundle(folder, sizes):
    checkpoint = make_checkpoint(folder / "checkpoint", sizes=sizes)
    assert export([str(checkpoint), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


def measure(bundle, target, side, images=1):
    command = [sys.executable, "-c", MEASURE, str(bundle), target, str(side), str(images)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_grows_with_the_patches_of_an_image_and_not_with_their_square(bundle):
    small, large = measure(bundle, "cpu", 64), measure(bundle, "cpu", 128)
    for result, patches in ((small, 64**2), (large, 128**2)):
        assert result["finite"] and result["num_kept"] == int(np.ceil(patches // 4 * 0.1))
    # 16,384 patches of 2 heads would take 2,147 MB of scores at once, 4,096 an eighth of one image's pixels more
    assert large["grown_mb"] < 6 * max(small["grown_mb"], 40), (small, large)
    assert large["grown_mb"] < 500, large
    # the vision stage gives its memory back: 13 to 17 MB stay, 38 to 62 otherwise
    assert large["held_mb"] < 25, large


def test_portable_graphs_hold_the_scores_of_one_head_at_a_time(tmp_path):
    # 4,096 patches: 67 MB a head, twice for softmax; 537 for all 8
    result = measure(make_bundle(tmp_path, replace(SIZES, vision_heads=8)), "portable", 64)
    assert result["finite"] and result["grown_mb"] < 300, result


def test_inner_values_of_the_mlp_never_exist_for_all_patches_at_once(tmp_path):
    # each would take 268 MB: 310 seen in tiles of tokens, 900 without
    result = measure(make_bundle(tmp_path, replace(SIZES, vision_intermediate_size=4096)), "cpu", 128)
    assert result["finite"] and result["grown_mb"] < 500, result


def test_the_vision_stage_in_tiles_of_tokens_computes_the_same(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", sizes=SIZES)
    pixels = np.random.default_rng(0).standard_normal((6 * 18, 1176), dtype=np.float32)
    inputs = ModelInputs(input_ids=[0], pixel_values=pixels, image_grid_thw=[[1, 6, 18]])
    assert_tiles_compute_the_same(checkpoint, tmp_path / "tiles", inputs, monkeypatch)


def test_first_layer_over_16384_visual_tokens_makes_no_square_of_them(bundle):
    # 64 images of 256 tokens: the vision stage is cheap, and S x S float32 would be 1,075 MB
    result = measure(bundle, "cpu", 32, images=64)
    assert result["finite"] and result["num_kept"] == 1639
    # 510 to 620 seen; the scores of one head alone, as a square, would be 1,070
    assert result["grown_mb"] < 800, result
