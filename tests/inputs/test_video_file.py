"""Video files of several formats, written here, are read back frame by frame; what is no video says so."""

import io
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks.memory_growth import resident_mb
from clips import BITS, load_video, number_of, numbered, write
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.video_file import FileFrames, index_file


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames at 10 a second, its index in front."""
    frames = [numbered(n) for n in range(60)]
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write(path, frames, options={"bf": "2"}, container_options={"movflags": "faststart"})


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
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew, whatever earlier tests took
    before = resident_mb("VmHWM")
    with pytest.raises(InvalidInput, match=r"grow\.avi"):
        list(load_video(path).frames)
    assert resident_mb("VmHWM") - before < 100  # one frame has 216


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


def test_a_file_cut_between_two_frames_is_an_error(tmp_path, clip):
    with av.open(str(clip)) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[: ends[50]])
    with pytest.raises(InvalidInput, match=r"cut\.mp4: cut short"):
        load_video(path)


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


def cover_alone(folder):
    with av.open(str(folder / "cover.mp3"), "w") as container:
        sound, cover = container.add_stream("mp3", rate=44100), container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 4410), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for stream, frame in ((cover, picture), (sound, silence)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder / "cover.mp3"


def empty(folder):
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (no_video, ("sound.wav", "no video")),
        (cover_alone, ("cover.mp3", "no video")),
        (not_a_video, ("text.mp4", "not a video")),
        (empty, ("empty.mp4", "empty")),
        (lambda folder: folder / "missing.mp4", ("missing.mp4", "no such file")),
        (lambda folder: folder, ("not a file",)),
        (lambda _: "data:video/mp4;base64,AAAA", ("video: got 'data:video/mp4", "Write it to a file")),
        (lambda _: "https://host/clip.mp4", ("https://host/clip.mp4", "not downloaded")),
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
