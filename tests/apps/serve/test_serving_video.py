"""Videos in a request: read as the pipeline reads them, in a worker process, within the limits of a server."""

import base64
import struct
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest

from clips import numbered, write
from hawk_trt import PruningConfig
from hawk_trt.apps.serve.errors import ApiError
from hawk_trt.apps.serve.protocol import VideoUrl
from serving import SAMPLES, image, question, serving
from vision_configs import INTERNVL

TEXT = {"type": "text", "text": "What is red?"}
PRUNING = PruningConfig(keep_ratio=0.3)


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, pruning=PRUNING, max_frames=8, prepare_seconds=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten seconds, of which a model's own rule takes 20 frames."""
    folder = tmp_path_factory.mktemp("clip")
    faststart = {"movflags": "faststart"}
    return write(folder / "clip.mp4", [numbered(number) for number in range(100)], container_options=faststart)


def video(content):
    url = content if isinstance(content, str) else f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def body(*parts, **fields):
    return question(**fields) | {"messages": [{"role": "user", "content": [*parts, TEXT]}]}


def refused(server, *parts):
    got = server.http.post("/v1/chat/completions", json=body(*parts))
    assert got.status_code == 400, got.text
    return got.json()["error"]


@pytest.mark.parametrize(("videos", "frames"), [(1, 8), (2, 4)])
def test_openais_client_sends_videos_and_all_of_a_request_share_the_frames(server, clip, videos, frames):
    parts = [video(clip.read_bytes())] * videos
    with server.openai() as client:
        got = client.chat.completions.create(**body(image(SAMPLES / "0-colour.png"), *parts))
    picture = {"type": "image", "image": SAMPLES / "0-colour.png"}
    shown = [picture, *[{"type": "video", "video": clip, "max_frames": frames}] * videos, TEXT]
    messages = [{"role": "user", "content": shown}]
    expected = server.pipe.generate(messages, pruning=PRUNING, max_new_tokens=8)
    assert server.pipe.prepare(messages).video_grid_thw[:, 0].tolist() == [frames // 2] * videos
    assert got.choices[0].message.content == expected.text
    assert (got.usage.visual_tokens, got.usage.kept_visual_tokens) == (expected.num_visual, expected.num_kept)


def test_a_video_url_may_be_a_text_and_what_chooses_frames_is_refused(server, clip):
    url = f" data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}\n"
    assert (
        server.http.post("/v1/chat/completions", json=body({"type": "video_url", "video_url": url})).status_code == 200
    )
    for part, place in (
        ({**video("data:,"), "fps": 1.0}, "messages[0].content[0].fps"),
        (
            {"type": "video_url", "video_url": {"url": "data:,", "nframes": 4}},
            "messages[0].content[0].video_url.nframes",
        ),
    ):
        error = refused(server, part)
        assert (error["param"], error["code"]) == (place, "unsupported")


def test_details_hold_no_image_and_an_unknown_key_is_ignored_and_told(server, clip):
    parts = video(clip.read_bytes()) | {"uuid": "a"}, image(SAMPLES / "0-colour.png")
    got = server.http.post("/v1/chat/completions", json=body(*parts, hawk={"details": True}))
    assert (got.status_code, got.headers["x-hawk-ignored"]) == (200, "messages[0].content[0].uuid")
    assert got.json()["hawk"]["images"] == [] and got.json()["hawk"]["seconds"]["vision"] > 0


def prepared(server, folder, *parts, **limits):
    """What a worker process makes of a request, within other limits."""
    own = server.service._preparation
    content = server.http.build_request("POST", "/", json=body(*parts)).content
    return replace(own, settings=replace(own.settings, **limits)).prepare(server.pipe.processor, content, {}, folder)


def test_frames_are_shrunk_to_the_pixels_that_a_request_may_have(server, clip, tmp_path):
    parts = video(clip.read_bytes()), image(SAMPLES / "0-colour.png")
    for pixels in (1_000_000, 80_000):
        got = prepared(server, tmp_path, *parts, max_image_pixels=pixels, max_frames=20)
        shown = {"type": "video", "video": clip, "total_pixels": pixels // 2}
        expected = server.pipe.prepare([{"role": "user", "content": [shown, TEXT]}])
        np.testing.assert_array_equal(got.inputs.video_grid_thw, expected.video_grid_thw)
    assert got.inputs.video_grid_thw[0].prod() < 10 * 2 * 12  # as large as they come


def test_frames_that_have_one_size_are_bounded_in_number_alone(server, tmp_path):
    bundle = SimpleNamespace(manifest=SimpleNamespace(vision=INTERNVL))
    preparation = replace(server.service._preparation, bundle=bundle)
    place = "messages[0].content[0].video_url"
    items, files = preparation._items({place: VideoUrl(url="data:,")}, {place: b"a"}, tmp_path, 8)
    assert items == [{"type": "video", "video": str(files[place]), "max_frames": 8}]


def lying(content):
    """The same with a table that tells of a thousand million frames."""
    place = content.index(b"stsz") + 12
    return content[:place] + struct.pack(">I", 1_000_000_000) + content[place + 4 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[: len(content) // 2], "cut short"),
        (lying, "1,000,000,000 frames"),
        (lambda _: b"not a video", "not a video"),
        (lambda _: b"", "is empty"),
        (lambda _: "data:video/mp4;base64,%%", "not valid base64"),
        (lambda _: "data:video/mp4,AA", "expected data:video/...;base64"),
        (lambda _: "https://videos.example/a.mp4", "fetches nothing from videos.example"),
        (lambda _: "file:///etc/passwd", "expected a data URL"),
    ],
)
def test_a_video_that_cannot_be_read_is_refused_by_its_place(server, clip, change, words):
    error = refused(server, video(change(clip.read_bytes())))
    place = "messages[0].content[0].video_url"
    assert error["message"].startswith(place) and words in error["message"], error
    assert error["param"] == place and "/tmp" not in error["message"]


def bomb(path, frames=600, side=2048):
    """A small file whose every frame must be decoded, each of 4 megapixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "tune": "zerolatency"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        grey = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 128, np.uint8), format="yuv420p")
        (packet, *_) = [*stream.encode(grey), *stream.encode()]
        content = bytes(packet)
        for number in range(frames):
            again = av.Packet(content)
            again.stream, again.time_base, again.pts, again.dts = stream, packet.time_base, number, number
            again.is_keyframe = number == 0
            container.mux(again)
    return path


def test_a_video_that_takes_too_long_to_decode_is_ended_and_leaves_no_file(server, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    error = refused(server, video(bomb(tmp_path / "bomb.mp4").read_bytes()))
    assert not list(folder.iterdir())
    assert error["code"] == "too_much_work" and server.service.workers.limiter.borrowed_tokens == 0
    assert server.http.post("/v1/chat/completions", json=question()).status_code == 200


def test_videos_count_as_images_do(server, clip, tmp_path):
    parts = video(clip.read_bytes()), image(SAMPLES / "0-colour.png")
    with pytest.raises(ApiError, match="got 2 images and videos, expected at most 1") as error:
        prepared(server, tmp_path, *parts, max_images=1)
    assert error.value.body.error.code == "too_many_images"


def test_a_server_without_pyav_says_so(server, clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ApiError, match="takes no videos: video files need PyAV") as error:
        prepared(server, tmp_path, video(clip.read_bytes()))
    assert (error.value.status, error.value.body.error.code) == (400, "unsupported")
