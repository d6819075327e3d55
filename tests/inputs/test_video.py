"""Videos: real files of several formats, written here, and read back frame by frame."""

import io
import os
import resource
import socket
import struct
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs import video as videos
from hawk_trt.inputs.messages import VisualItem
from hawk_trt.inputs.video_file import FileFrames, index_file
from hawk_trt.models.qwen_patches import sample_indices

BITS = 10
FORMATS = {
    "x264.mp4": ("libx264", {"bf": "2"}),
    "x264.mkv": ("libx264", {"bf": "2"}),
    "x264.ts": ("libx264", {"bf": "2"}),
    "x264.flv": ("libx264", {"bf": "2"}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4.mov": ("mpeg4", {}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "vp8.webm": ("libvpx", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "raw.h264": ("libx264", {"bf": "2"}),
}


def load_video(source, **options):
    return videos.load_video(VisualItem("video", source, **options), sample_indices)


def numbered(number):
    """A frame that shows its number as black and white squares, and which way is up: uint8 [32, 160, 3]."""
    frame = np.zeros((32, 16 * BITS, 3), np.uint8)
    for bit in range(BITS):
        frame[:16, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    frame[16:] = (200, 30, 30)
    return frame


def number_of(frame):
    return sum(int(frame[8, 16 * bit + 8].mean() > 128) << bit for bit in range(BITS))


def write(path, frames, codec="libx264", fps=10, gop=12, options=None, container_options=None):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


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
    assert len(load_video(clip, fps=0.1).frames) == 4  # never fewer, where there are so many
    assert len(load_video(f"file://{clip}", fps=1000).frames) == 60


@pytest.mark.parametrize("name", FORMATS)
def test_frames_of_every_format_are_the_ones_of_a_plain_decode(tmp_path, name):
    codec, options = FORMATS[name]
    path = write(tmp_path / name, [numbered(n) for n in range(240)], codec, fps=25, gop=24, options=options)
    with av.open(str(path)) as container:
        plain = [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert plain == list(range(240))
    index = index_file(path)
    assert (index.total, index.fps) == (240, 25)
    for numbers in ([0, 3, 100, 101, 175, 239], [47, 48, 49], [120], list(range(0, 240, 7))):
        assert [number_of(frame) for frame in FileFrames(index, tuple(numbers))] == numbers


def test_far_frames_are_reached_without_decoding_what_lies_between(tmp_path, monkeypatch):
    path = write(tmp_path / "long.mp4", [numbered(n) for n in range(600)], gop=20)
    decoded = 0
    plain_decode = av.container.InputContainer.decode

    class Counting:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._container.close()

        def decode(self, stream):
            nonlocal decoded
            for picture in plain_decode(self._container, stream):
                decoded += 1
                yield picture

    plain_open = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: Counting(plain_open(*args, **options)))
    video = load_video(path, fps=0.1)
    assert [number_of(frame) for frame in video.frames] == [0, 100, 200, 300, 400, 500]
    assert decoded < 250  # of 501: threads decode ahead


def test_frames_can_be_taken_by_number_and_slice(clip):
    frames = load_video(clip).frames
    assert number_of(frames[0]) == 0
    assert number_of(frames[-1]) == 55
    assert [number_of(frame) for frame in frames[::4]] == [0, 20, 40]
    assert len(frames[2:5]) == 3
    with pytest.raises(IndexError):
        frames[12]


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


def timed(path, times_ms, codec="libx264"):
    """A video whose frame n is shown at times_ms[n]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 16 * BITS, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


VARYING_MS = [*(number * 1000 // 30 for number in range(30)), *(1000 + 1000 * number for number in range(30))]


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


def test_the_film_is_shown_not_the_cover_before_it(tmp_path):
    path = tmp_path / "cover.mkv"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        film = container.add_stream("libx264", rate=10)
        film.width, film.height, film.pix_fmt = 16 * BITS, 32, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        for number in range(20):
            container.mux(film.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(film.encode())
    assert [number_of(frame) for frame in load_video(path).frames] == [0, 5, 10, 15]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_is_a_video(tmp_path, kind):
    pictures = [Image.fromarray(numbered(number)) for number in range(8)]
    path = tmp_path / f"animated.{kind.lower()}"
    durations = [100, 100, 100, 100, 1000, 1000, 1000, 1000]
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    video = load_video(path, num_frames=8)
    assert [number_of(frame) for frame in video.frames] == list(range(8))
    assert video.times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 1.4, 2.4, 3.4])
    assert [number_of(frame) for frame in video.frames[2:4]] == [2, 3]


def test_an_animated_png_leaves_its_still_picture_out(tmp_path):
    still, *pictures = (Image.fromarray(numbered(number)) for number in (99, 0, 1, 2, 3))
    path = tmp_path / "still.png"
    still.save(path, save_all=True, default_image=True, append_images=pictures, duration=100)
    assert [number_of(frame) for frame in load_video(path).frames] == [0, 1, 2, 3]


def test_metadata_in_latin_1_do_not_lose_the_video(tmp_path):
    path = tmp_path / "latin.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf\u00e9"
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 16 * BITS, "yuv420p"
        for number in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count("caf\u00e9".encode()) == 1
    path.write_bytes(content.replace("caf\u00e9".encode(), b"caf\xe9 "))
    assert len(load_video(path).frames) == 4


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"num_frames": 6}, [0, 10, 20, 30, 40, 50]),
        ({"min_frames": 20}, [*range(0, 60, 3)]),
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


def test_a_folder_named_like_a_protocol_is_a_folder(tmp_path, clip, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        folder = tmp_path / f"http:/127.0.0.1:{server.getsockname()[1]}"
        folder.mkdir(parents=True)
        (folder / "clip.mp4").write_bytes(clip.read_bytes())
        monkeypatch.chdir(tmp_path)
        path = f"http:/{folder.name}/clip.mp4"
        assert [number_of(frame) for frame in load_video(path, num_frames=2).frames] == [0, 30]
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_playlist_opens_no_other_file(tmp_path, clip):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{clip}\n#EXT-X-ENDLIST\n")
    with pytest.raises(InvalidInput, match="not a video, or damaged"):
        load_video(playlist)


def motion_jpegs(path, pictures):
    """An AVI of JPEGs that says it is 64 x 64."""

    def chunk(kind, content):
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    main = struct.pack("<14I", 250_000, 0, 0, 16, len(pictures), 0, 1, 0, 64, 64, 0, 0, 0, 0)
    header = b"vidsMJPG" + struct.pack("<IHHIIIIIIII4H", 0, 0, 0, 0, 1, 4, 0, len(pictures), 0, 0, 0, 0, 0, 64, 64)
    shape = struct.pack("<IiiHH4sIiiII", 40, 64, 64, 1, 24, b"MJPG", 64 * 64 * 3, 0, 0, 0, 0)
    frames = b"".join(chunk(b"00dc", picture) for picture in pictures)
    lists = chunk(
        b"LIST",
        b"hdrl" + chunk(b"avih", main) + chunk(b"LIST", b"strl" + chunk(b"strh", header) + chunk(b"strf", shape)),
    )
    path.write_bytes(chunk(b"RIFF", b"AVI " + lists + chunk(b"LIST", b"movi" + frames)))
    return path


def test_a_frame_that_is_too_large_is_refused_before_it_is_decoded(tmp_path):
    def jpeg(side):
        file = io.BytesIO()
        Image.new("L", (side, side), 80).save(file, "JPEG")
        return file.getvalue()

    same = motion_jpegs(tmp_path / "same.avi", [jpeg(64)] * 4 + [jpeg(200)] * 4)
    assert [frame.shape for frame in load_video(same).frames] == [(64, 64, 3)] * 4
    path = motion_jpegs(tmp_path / "grow.avi", [jpeg(64)] * 2 + [jpeg(12_000)] * 6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInput, match=r"grow\.avi"):
        list(load_video(path).frames)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; one frame has 216,000


@pytest.mark.parametrize("count", [1_000_000, 2**31 - 1])
def test_a_sample_table_that_lies_is_refused_at_once(tmp_path, clip, count):
    content = bytearray(clip.read_bytes())
    table = content.index(b"stsz")
    content[table + 8 : table + 16] = struct.pack(">II", 1, count)
    path = tmp_path / "lies.mp4"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=f"damaged, it says {count:,} frames"):
        load_video(path)


def test_a_portrait_phone_video_comes_upright(tmp_path, clip):
    content = bytearray(clip.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 20] = struct.pack(">5i", 0, 1 << 16, 0, -(1 << 16), 0)  # turn clockwise to show
    path = tmp_path / "portrait.mp4"
    path.write_bytes(content)
    upright = load_video(path).frames[3]
    assert upright.shape == (160, 32, 3)
    assert number_of(np.rot90(upright)) == 15  # turned back


def test_frames_given_one_by_one_are_all_used(tmp_path):
    arrays = [numbered(n) for n in range(5)]
    Image.fromarray(arrays[1]).save(tmp_path / "1.png")
    mixed = [Image.fromarray(arrays[0]), tmp_path / "1.png", arrays[2], arrays[3], arrays[4]]
    for source in (mixed, arrays, np.stack(arrays), tuple(arrays)):
        video = load_video(source)
        assert [number_of(frame) for frame in video.frames] == [0, 1, 2, 3, 4]
        assert video.seconds_per_frame == 0.5
    assert load_video(arrays, fps=4).seconds_per_frame == 0.25


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", ["front.mp4", "back.mp4"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, clip, name, share):
    path = tmp_path / name
    if name == "front.mp4":
        path.write_bytes(clip.read_bytes())
    else:
        write(path, [numbered(n) for n in range(60)])
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InvalidInput, match=name):
        list(load_video(path).frames)


def test_damage_in_the_middle_is_an_error_that_names_the_file(tmp_path, clip):
    content = bytearray(clip.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 600] = bytes(600)
    path = tmp_path / "holed.mp4"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"holed\.mp4"):
        list(load_video(path, fps=10).frames)


def test_a_seek_table_that_points_behind_the_frame_costs_time_not_frames(tmp_path):
    index = index_file(write(tmp_path / "long.mp4", [numbered(n) for n in range(200)], gop=20))
    late = tuple(time + 40 * int(index.times[1] - index.times[0]) for time in index.key_times)
    wrong = replace(index, key_times=(0, *late[1:]))
    assert [number_of(frame) for frame in FileFrames(wrong, (5, 90, 150))] == [5, 90, 150]


def no_video(folder):
    path = folder / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return path


def not_a_video(folder):
    (folder / "text.mp4").write_text("not a video " * 100)
    return folder / "text.mp4"


def empty(folder):
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (no_video, ("sound.wav", "no video")),
        (not_a_video, ("text.mp4", "not a video")),
        (empty, ("empty.mp4", "empty")),
        (lambda folder: folder / "missing.mp4", ("missing.mp4", "no such file")),
        (lambda folder: folder, ("not a file",)),
        (lambda _: "https://host/clip.mp4", ("https://host/clip.mp4", "not fetched")),
        (lambda _: [], ("no frame",)),
        (lambda _: np.zeros((0, 4, 4, 3), np.uint8), ("no frame",)),
        (lambda _: np.zeros((4, 4, 3), np.uint8), ("uint8[4, 4, 3]", "[frames, height, width, 3]")),
        (lambda _: np.zeros((2, 4, 4, 3), np.float32), ("float32", "uint8")),
        (lambda _: b"bytes", ("bytes", "a path")),
        (lambda _: 7, ("int", "a path")),
        (lambda _: ["missing.png"], ("missing.png", "no such file")),
    ],
)
def test_what_is_no_video_is_an_error_that_names_it(tmp_path, source, words):
    with pytest.raises(InvalidInput) as error:
        load_video(source(tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)


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
