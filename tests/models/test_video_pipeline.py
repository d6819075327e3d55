"""Videos through the whole pipeline: pruned answers, quotas a frame, long clips in bounded memory, early refusals."""

import copy
import json
import math
import shutil
import subprocess
import sys

import av
import msgspec
import numpy as np
import pytest

from export.__main__ import main as export
from export.random_checkpoint import random_checkpoint
from export.writer import ExportOptions
from export.writer import export as write
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main as hawk_trt
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.turns import VisualItem
from hawk_trt.models import qwen_video
from hawk_trt.models.family import joined_rows
from hawk_trt.models.qwen2_5_vl import Qwen25VL
from hawk_trt.models.qwen_video import max_frame_pixels
from hawk_trt.models.streamed_rows import StreamedRows
from released import with_few_layers
from vision_configs import QWEN2_5_VL

QUESTION = "What is red?"
FAMILY = Qwen25VL(QWEN2_5_VL)
TOKEN = 28 * 28

# Answers about a clip in a process of its own and prints its peak memory, which is not the test's own.
MEASURE = """
import json, sys
from pathlib import Path
from hawk_trt import Pipeline, PruningConfig
pipe = Pipeline.load(sys.argv[1])
result = pipe.generate("What is red?", videos=[sys.argv[2]], pruning=PruningConfig(keep_ratio=0.02), max_new_tokens=2)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({"num_visual": result.num_visual, "num_kept": result.num_kept, "peak_mb": peak / 1024}))
"""


def write_clip(path, count, size=(112, 168), fps=2):
    """A square that wanders over noise, one step a frame."""
    noise = np.random.default_rng(0).integers(0, 80, (*size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            frame = noise.copy()
            left = number * 8 % (size[1] - 32)
            frame[20:52, left : left + 32] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 20)


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def video_message(source, **sampling):
    return [
        {
            "role": "user",
            "content": [{"type": "video", "video": source, **sampling}, {"type": "text", "text": QUESTION}],
        }
    ]


@pytest.fixture(scope="module")
def reference(pipe, tiny_checkpoint):
    pytest.importorskip("torch")
    from hawk_trt.apps.parity.reference import Reference

    weights = pipe.bundle.manifest.head_weights.values
    return Reference.load(tiny_checkpoint, head_weights=weights, normalization=pipe.bundle.manifest.normalization)


@pytest.mark.parametrize("quota", ["global", "per-frame"])
@pytest.mark.parametrize("keep_ratio", [0.1, 0.3])
def test_a_pruned_video_file_is_answered_as_in_pytorch_with_the_documented_positions(
    pipe, reference, clip, quota, keep_ratio
):
    inputs = pipe.prepare(video_message(clip, fps=1))
    assert inputs.video_grid_thw.tolist() == [[5, 8, 12]] and inputs.second_per_grid_ts.tolist() == [2.0]
    pruning = PruningConfig(keep_ratio, quota=quota)
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=6, ignore_eos=True, return_logits=True)
    expected = reference.run(reference.embed(inputs, prompt_tokens(pipe.bundle)), pruning, steps=6)
    np.testing.assert_array_equal(result.kept_indices, expected.kept_indices)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    assert result.token_ids == list(expected.tokens)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=0, atol=1e-3)


def test_a_quota_per_frame_keeps_the_same_share_of_every_temporal_patch(pipe, clip):
    inputs = pipe.prepare(video_message(clip))
    steps, tokens = inputs.video_grid_thw[0, 0], int(inputs.video_grid_thw[0].prod()) // 4
    result = pipe.generate(inputs, pruning=PruningConfig(0.2, quota="per-frame"), max_new_tokens=1)
    visual = np.flatnonzero(inputs.input_ids == pipe.bundle.manifest.special_tokens.video)
    frames = np.searchsorted(visual, np.intersect1d(result.kept_indices, visual)) // (tokens // steps)
    assert np.bincount(frames, minlength=steps).tolist() == [math.ceil(tokens / steps * 0.2)] * steps


def test_frames_are_sampled_as_asked_and_time_advances_with_them(pipe, clip):
    for sampling, steps, seconds in (
        ({}, 10, 1.0),
        ({"fps": 1}, 5, 2.0),
        ({"max_frames": 6}, 3, 20 / 6),
        ({"fps": 1, "max_frames": 4}, 2, 5.0),
    ):
        inputs = pipe.prepare(video_message(clip, **sampling))
        assert inputs.video_grid_thw[0, 0] == steps
        assert inputs.second_per_grid_ts.tolist() == pytest.approx([seconds])
        times = pipe.processor.layout(inputs).position_ids[0][
            inputs.input_ids == pipe.bundle.manifest.special_tokens.video
        ]
        rate = pipe.bundle.manifest.vision.tokens_per_second
        assert (np.unique(times) - times[0]).tolist() == [math.floor(step * seconds * rate) for step in range(steps)]


def test_the_command_takes_a_rate_and_a_most_of_frames(tiny_bundle, clip, capsys):
    command = ["run", str(tiny_bundle), "--video", str(clip), "--prompt", QUESTION, "--max-new-tokens", "2", "--json"]
    for options, steps in (([], 10), (["--fps", "1"], 5), (["--fps", "1", "--max-frames", "4"], 2)):
        assert hawk_trt([*command, *options]) == 0
        assert json.loads(capsys.readouterr().out)["num_visual"] == steps * 24
    picture = ["--image", "examples/tiny-vlm/samples/0-colour.png"]
    for options, message in (
        (["--fps", "0"], "--fps: got 0, expected above 0"),
        (["--fps", "nan"], "--fps: got nan"),
        (["--max-frames", "1"], "--max-frames: got 1, expected at least 2"),
    ):
        assert hawk_trt([*command, *options]) == 1
        assert message in capsys.readouterr().err
    assert hawk_trt([*command[:2], *picture, "--prompt", QUESTION, "--fps", "2"]) == 1
    assert "--fps: got it without a --video" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_a_most_of_frames_that_is_no_number_of_frames_is_refused(pipe, clip, value):
    with pytest.raises(InvalidInput, match="max_frames"):
        pipe.prepare(video_message(clip, max_frames=value))


def settings(**changes):
    bounds = {"min_pixels": 3136, "max_pixels": 768 * TOKEN} | changes
    return FAMILY.image_settings(bounds)


@pytest.mark.parametrize(
    ("said", "asked", "frames"),
    [  # of 20 frames in 10 seconds
        ({}, {}, 20),
        ({"fps": 1, "min_frames": 4, "max_frames": 768, "do_sample_frames": False}, {}, 10),
        ({"fps": 1.0, "max_frames": 768}, {"fps": 0.8}, 8),
        ({"max_frames": 6.0}, {}, 6),
        ({"max_frames": 6}, {"max_frames": 8}, 8),
        ({"fps": 0.5, "min_frames": 12}, {}, 12),
        ({"min_frames": 12}, {"max_frames": 6}, 6),
        ({"num_frames": 16, "fps": None}, {}, 16),
        ({"num_frames": 16}, {"fps": 1.0}, 10),
        ({"num_frames": 16}, {"num_frames": 4}, 4),
        ({"num_frames": 64}, {}, 20),
    ],
)
def test_the_checkpoint_says_how_a_file_is_sampled_where_the_prompt_does_not(pipe, clip, said, asked, frames):
    processor = copy.copy(pipe.processor)
    processor.sampling = msgspec.convert(said, type(processor.sampling), strict=False)
    assert len(processor.open_video(VisualItem("video", clip, **asked)).frames) == frames
    listed = processor.open_video(VisualItem("video", [np.zeros((28, 28, 3), np.uint8)] * 5))
    assert (len(listed.frames), listed.seconds_per_frame) == (5, 0.5)


def test_frames_of_a_long_video_share_the_context_as_in_qwens_processor():
    from dataclasses import replace

    def tokens(frames, context=128_000):
        bounded = replace(settings(), max_video_tokens=context)
        return max_frame_pixels(frames, bounded, QWEN2_5_VL) / TOKEN

    assert tokens(4) == tokens(300) == 768  # a frame's own bound
    assert tokens(480) == 480  # 115,200 tokens over 240 temporal patches
    assert tokens(768) == 300
    assert tokens(768, context=32_768) == pytest.approx(76.8, abs=0.01)
    assert tokens(10**9) == pytest.approx(4.2, abs=0.01)  # at least 1.05 times the least area
    assert max_frame_pixels(768, settings(), QWEN2_5_VL) == 768 * TOKEN


def test_a_checkpoint_without_bounds_for_videos_gets_qwens_own(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    for name in ("preprocessor_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        if name == "config.json":
            content["text_config"]["max_position_embeddings"] = 128_000
        else:
            content["size"] = {"shortest_edge": 3136, "longest_edge": 16384 * TOKEN}
        (folder / name).write_text(json.dumps(content))
    frames = [np.zeros((1080, 1920, 3), np.uint8)] * 2
    for own, tokens in ((None, 18 * 40), ({"size": {"shortest_edge": 3136, "longest_edge": 200 * TOKEN}}, 10 * 18)):
        if own is not None:
            (folder / "video_preprocessor_config.json").write_text(json.dumps(own))
        assert export([str(folder), "--out", str(tmp_path / "bundle"), "--target", "cpu"]) == 0
        with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
            grid = pipe.prepare(video_message(frames)).video_grid_thw[0]
            assert grid.prod() // 4 == tokens
            # the caller's bound goes before both
            larger = pipe.prepare(video_message(frames), max_pixels=1000 * TOKEN).video_grid_thw[0]
            assert 900 <= larger.prod() // 4 <= 1000


def test_streamed_patches_equal_the_whole_array_and_are_made_in_order(clip, monkeypatch, pipe):
    whole = pipe.prepare(video_message(clip))
    assert isinstance(whole.pixel_values_videos, np.ndarray)
    monkeypatch.setattr(qwen_video, "STREAMED_FROM_PATCHES", 1)
    streamed = pipe.prepare(video_message(clip))
    rows = streamed.pixel_values_videos
    assert isinstance(rows, StreamedRows) and rows.shape == whole.pixel_values_videos.shape
    np.testing.assert_array_equal(np.asarray(rows), whole.pixel_values_videos)
    for part in (slice(100, 300), slice(0, 50), slice(50, 60), slice(900, None), slice(5, 5)):
        np.testing.assert_array_equal(rows[part], whole.pixel_values_videos[part])
    options = {"pruning": PruningConfig(0.3), "max_new_tokens": 4, "ignore_eos": True, "return_logits": True}
    one, other = pipe.generate(whole, **options), pipe.generate(streamed, **options)
    assert one.token_ids == other.token_ids
    np.testing.assert_array_equal(one.kept_indices, other.kept_indices)
    np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)


def test_joined_rows_are_streamed_where_a_part_is():
    first, second = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((2, 2), np.float32)
    streamed = StreamedRows(3, 2, lambda: iter((first[:1], first[1:])))
    joined = joined_rows([second, streamed, second])
    assert isinstance(joined, StreamedRows)
    expected = np.concatenate([second, first, second])
    np.testing.assert_array_equal(joined[1:6], expected[1:6])
    np.testing.assert_array_equal(np.asarray(joined), expected)
    assert isinstance(joined_rows([first, second]), np.ndarray)


def test_a_file_that_breaks_while_its_patches_are_read_is_an_error_that_names_it(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(qwen_video, "STREAMED_FROM_PATCHES", 1)
    path = tmp_path / "holed.mp4"
    content = bytearray(write_clip(tmp_path / "whole.mp4", 60).read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    inputs = pipe.prepare(video_message(path))
    with pytest.raises(InvalidInput, match=r"holed\.mp4"):
        pipe.generate(inputs, max_new_tokens=1)


def test_more_tokens_than_the_context_are_refused_with_the_count_and_what_helps(pipe):
    image = np.zeros((448, 448, 3), np.uint8)
    with pytest.raises(InvalidInput, match=r"got \d+ tokens, 4352 of them of images and videos.*4096.*--max-pixels"):
        pipe.prepare(QUESTION, images=[image] * 17)


def test_a_long_video_shrinks_its_frames_to_fit_the_context(pipe):
    frames = [np.zeros((224, 224, 3), np.uint8)] * 400
    grid = pipe.prepare(video_message(frames)).video_grid_thw[0]
    assert grid[0] == 200 and grid.prod() // 4 <= 0.9 * 4096


def test_three_minutes_of_video_stay_within_a_memory_bound(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = with_few_layers(json.loads((folder / "config.json").read_text()))
    config["text_config"]["max_position_embeddings"] = 128_000
    config["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}  # more layers take time, and no more memory
    config["eos_token_id"] = config["text_config"]["eos_token_id"]
    bounds = json.loads((folder / "preprocessor_config.json").read_text())
    bounds["size"] = {"shortest_edge": 3136, "longest_edge": 16384 * TOKEN}
    (folder / "preprocessor_config.json").write_text(json.dumps(bounds))
    write(random_checkpoint(folder, config), tmp_path / "bundle", ExportOptions(targets=("cpu",)), name="tiny")
    path = write_clip(tmp_path / "long.mp4", 360, (280, 504))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "bundle"), str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_visual"] == 180 * 10 * 18
    pixel_mb = result["num_visual"] * 4 * 1176 * 4 / 2**20
    assert pixel_mb > 550  # what a whole array of its patches would take
    assert result["peak_mb"] < 700, result  # 435 seen
