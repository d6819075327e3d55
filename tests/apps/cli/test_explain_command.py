"""hawk-trt explain."""

import json
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from export.__main__ import main as export
from hawk_trt.apps.cli.main import main


def test_explain_draws_and_tells_every_keep_ratio(ask, sample, tmp_path, capsys):
    picture = tmp_path / "pictures" / "explained.png"
    argv = ["explain", *ask[1:], "--keep-ratios", "0.1,0.5", "--out", str(picture), "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompt"], told["num_visual"]) == (sample[1], 64)
    (item,) = told["items"]
    assert item["grid"] == [1, 8, 8]
    assert [selection["num_kept"] for selection in told["selections"]] == [7, 32]
    assert [selection["answer"] for selection in told["selections"]] == [sample[2]] * 2
    few, many = (np.array(selection["kept"][0][0]) for selection in told["selections"])
    assert (few.sum(), many.sum()) == (7, 32)
    scores = np.array(item["scores"][0])
    assert scores[few].min() >= scores[~few].max()
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 1000


@pytest.fixture(scope="module")
def video_bundle(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a chat template that takes videos, as those of the released models do."""

    folder = tmp_path_factory.mktemp("video")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns("samples"))
    template = folder / "checkpoint" / "chat_template.jinja"
    image = "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    video = "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    assert image in template.read_text()
    template.write_text(template.read_text().replace(image, image + video))
    assert export([str(folder / "checkpoint"), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_explain_draws_the_steps_of_a_video_beside_an_image(video_bundle, sample, tmp_path, capsys):
    path, picture = tmp_path / "clip.mp4", tmp_path / "e.png"
    # Each frame has its own brightness, so that the picture shows which ones were drawn.
    write_video(path, [np.full((112, 112, 3), 16 * index, np.uint8) for index in range(16)])
    visual = ["--video", str(path), "--image", str(sample[0])]
    argv = ["explain", str(video_bundle), *visual, "--prompt", "Count the circles.", "--max-new-tokens", "2"]
    assert main([*argv, "--keep-ratios", "1.0", "--json", "--out", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(item["kind"], item["grid"]) for item in told["items"]] == [("image", [1, 8, 8]), ("video", [8, 4, 4])]
    with Image.open(picture) as drawn:
        column = np.asarray(drawn.convert("L"))[:, 40].astype(int)
    shown = [value for value in range(256) if (abs(column - value) <= 1).sum() > 250 and value < 240]
    steps = np.linspace(0, 7, 6).round().astype(int)
    assert [min(abs(value - 32 * step) for value in shown) <= 4 for step in steps] == [True] * 6


def test_explain_prints_a_table(ask, sample, tmp_path, capsys):
    assert main(["explain", *ask[1:], "--keep-ratios", "0.2", "--out", str(tmp_path / "e.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0.2", "13", "of", "64", *sample[2].split()]


def test_explain_without_an_image_says_what_is_missing(tiny_bundle, tmp_path, capsys):
    assert main(["explain", str(tiny_bundle), "--prompt", "Hello", "--out", str(tmp_path / "e.png")]) == 1
    assert "--image" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
