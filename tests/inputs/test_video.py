"""Which frames of a video are taken, and their times."""

import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clips import load_video, number_of, numbered, timed, write
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs import video
from hawk_trt.models.qwen_video import sample_indices


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames at 10 a second, its index in front."""
    frames = [numbered(n) for n in range(60)]
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write(path, frames, options={"bf": "2"}, container_options={"movflags": "faststart"})


def test_a_file_is_sampled_at_two_frames_a_second(clip):
    video = load_video(clip)
    assert [number_of(frame) for frame in video.frames] == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]
    assert video.seconds_per_frame == 0.5
    assert all(frame.dtype == np.uint8 and frame.shape == (32, 160, 3) for frame in video.frames)


def test_the_sampled_rate_can_be_asked_for(clip):
    video = load_video(str(clip), fps=5)
    assert len(video.frames) == 30
    assert video.seconds_per_frame == pytest.approx(0.2)
    assert len(load_video(clip, max_frames=7).frames) == 6
    assert len(load_video(clip, fps=5, max_frames=7).frames) == 6
    assert len(load_video(clip, fps=0.1).frames) == 4  # never fewer, where there are so many
    assert len(load_video(f"file://{clip}", fps=1000).frames) == 60


@pytest.mark.parametrize("video_fps", [10.0, 24.0, 25.0, 30000 / 1001, 59.94])
@pytest.mark.parametrize("fps", [1.0, 2.0, 3.7])
def test_indices_are_those_of_the_qwen2_vl_video_processor(video_fps, fps):
    for total in [*range(4, 400), 1000, 5000, 12345, 107_892]:
        count = int(min(max(total / video_fps * fps, 4), total // 2 * 2, 768, total) // 2 * 2)
        theirs = torch.arange(0, total, total / count).int().tolist()[:count]
        ours = sample_indices(total, video_fps, fps).tolist()
        assert ours == theirs, total


def test_very_short_files_keep_what_they_have(tmp_path):
    assert sample_indices(1, 30, 2).tolist() == [0]
    assert sample_indices(2, 30, 2).tolist() == [0, 1]
    assert sample_indices(3, 30, 2).tolist() == [0, 1]
    video = load_video(write(tmp_path / "one.mp4", [numbered(5)]))
    assert [number_of(frame) for frame in video.frames] == [5]
    assert video.seconds_per_frame == pytest.approx(0.1)


VARYING_MS = [*(number * 1000 // 30 for number in range(30)), *(1000 + 1000 * number for number in range(30))]


@pytest.mark.parametrize("times_ms", [[0] * 40, [number // 2 * 200 for number in range(40)]])
def test_frames_of_one_time_are_told_apart(tmp_path, times_ms):
    video = load_video(timed(tmp_path / "same.mkv", times_ms), num_frames=8)
    assert [number_of(frame) for frame in video.frames] == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize("name", ["varying.mp4", "varying.mkv"])
def test_a_varying_frame_rate_gives_the_times_of_the_file(tmp_path, name):
    video = load_video(timed(tmp_path / name, VARYING_MS))
    shown = [number_of(frame) for frame in video.frames]
    assert shown == list(range(60))  # 30 seconds at 2 a second
    assert video.times == pytest.approx([VARYING_MS[number] / 1000 for number in shown], abs=0.002)
    assert video.seconds_per_frame == pytest.approx(30 / 59)


def test_transformers_rule_for_times_can_be_asked_for(tmp_path):
    path = timed(tmp_path / "varying.mp4", VARYING_MS)
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
    video = load_video(path, timestamps=False)
    assert video.times == pytest.approx([number_of(frame) / rate for frame in video.frames])


def test_a_pause_and_a_late_start_count_from_the_first_frame(tmp_path):
    pause = [*range(0, 1000, 100), *range(60_000, 61_000, 100)]
    video = load_video(timed(tmp_path / "pause.mkv", [5000 + time for time in pause]))
    assert video.times == pytest.approx([pause[number_of(frame)] / 1000 for frame in video.frames])
    steady = load_video(timed(tmp_path / "late.mkv", range(9000, 11_000, 100)))
    assert steady.times == pytest.approx([0.0, 0.5, 1.0, 1.5])


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"num_frames": 6}, [0, 10, 20, 30, 40, 50]),
        ({"num_frames": 5}, [0, 15, 30, 45]),  # rounded as in transformers and qwen-vl-utils
        ({"num_frames": 7}, [0, 7, 15, 22, 30, 37, 45, 52]),
        ({"min_frames": 20}, [*range(0, 60, 3)]),
        ({"min_frames": 19}, [*range(0, 60, 3)]),
        ({"fps": 1, "min_frames": 4}, [0, 10, 20, 30, 40, 50]),
        ({"start": 3.0}, [30, 35, 40, 45, 50, 55]),
        ({"start": 1.0, "end": 3.9}, [10, 15, 20, 25, 30, 35]),
        ({"end": 1.5, "fps": 10}, [*range(16)]),
        ({"start": 2.0, "end": 3.0, "num_frames": 2}, [20, 25]),
    ],
)
def test_how_many_frames_and_of_which_part_can_be_asked_for(clip, options, numbers):
    video = load_video(clip, **options)
    shown = [number_of(frame) for frame in video.frames]
    assert shown == numbers
    assert video.times == pytest.approx([number / 10 for number in numbers])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 61}, "got 60 frames, expected at least 61"),
        ({"num_frames": 4, "fps": 2}, "num_frames: got fps"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames: got 9, expected at most max_frames, 8"),
        ({"start": 7.0}, "got 0 frames from second 7"),
        ({"start": 3.0, "end": 2.0}, "expected 0 <= start < end"),
        ({"start": -1.0}, "expected 0 <= start < end"),
    ],
)
def test_a_choice_of_frames_that_cannot_be_made_is_refused(clip, options, words):
    with pytest.raises(InvalidInput, match=words):
        load_video(clip, **options)


@pytest.mark.parametrize(
    "options", [{"num_frames": 2}, {"max_frames": 2}, {"min_frames": 5}, {"start": 0.0}, {"end": 1.0}]
)
def test_frames_given_one_by_one_are_not_chosen_from(options):
    frames = [numbered(number) for number in range(4)]
    with pytest.raises(InvalidInput, match="got 4 frames in a list, all of which are used"):
        load_video(frames, **options)
    assert len(load_video(frames, max_frames=4, min_frames=2).frames) == 4


def test_frames_given_one_by_one_are_all_used(tmp_path):
    arrays = [numbered(n) for n in range(5)]
    Image.fromarray(arrays[1]).save(tmp_path / "1.png")
    mixed = [Image.fromarray(arrays[0]), tmp_path / "1.png", arrays[2], arrays[3], arrays[4]]
    for source in (mixed, arrays, np.stack(arrays), tuple(arrays)):
        video = load_video(source)
        assert [number_of(frame) for frame in video.frames] == [0, 1, 2, 3, 4]
        assert video.seconds_per_frame == 0.5
    assert load_video(arrays, fps=4).seconds_per_frame == 0.25


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(clip, fps):
    with pytest.raises(InvalidInput, match="fps"):
        load_video(clip, fps=fps)


def test_too_few_frames_cannot_be_asked_for(clip):
    with pytest.raises(InvalidInput, match="max_frames: got 1"):
        load_video(clip, max_frames=1)


def test_a_file_without_pyav_says_how_to_install_it_and_frames_need_none(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendError, match="pip install av"):
        load_video(clip)
    assert len(load_video([numbered(0)]).frames) == 1


def test_a_video_needs_no_item_around_it(clip):
    assert video.load_video(clip, fps=1.0, max_frames=4).times == load_video(clip, fps=1.0, max_frames=4).times
