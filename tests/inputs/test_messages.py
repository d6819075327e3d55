"""Prompts are read in every common shape, and what cannot be read says what was expected."""

import numpy as np
import pytest

from hawk_trt.errors import InvalidInput
from prompts import VL_TEMPLATE, chat_tokenizer, ids_of, text, user, visual_items


def test_a_string_puts_images_then_videos_before_the_text():
    tokenizer = chat_tokenizer()
    prompt = ("Which?", ["a.png", "c.png"], ["b.mp4"])
    assert [(item.kind, item.source) for item in visual_items(tokenizer.encode(*prompt))] == [
        ("image", "a.png"),
        ("image", "c.png"),
        ("video", "b.mp4"),
    ]
    decoded = tokenizer.tokenizer.decode(ids_of(tokenizer, *prompt).tolist(), skip_special_tokens=False)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert f"<|im_start|>user\n{image}{image}{video}Which?<|im_end|>\n<|im_start|>assistant\n" in decoded


def test_items_without_a_source_take_the_next_image_or_video():
    messages = [
        user({"type": "image"}, text("x"), {"image": "b.png"}, {"type": "video", "fps": 0.5}, {"type": "image"})
    ]
    encoded = chat_tokenizer().encode(messages, images=["a.png", "c.png"], videos=["v.mp4"])
    assert [item.source for item in visual_items(encoded)] == ["a.png", "b.png", "v.mp4", "c.png"]
    assert [item.fps for item in visual_items(encoded)] == [None, None, 0.5, None]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([user(text("x"))], ["a.png"], "images: got 1, but the messages have 0 image items"),
        ([user({"type": "image"}, {"type": "image"})], ["a.png"], "images: got 1, but the messages have 2 image items"),
        ([user({"type": "video"})], [], "videos: got 0, but the messages have 1 video items"),
        ([], [], "messages: got an empty list"),
        ({"role": "user", "content": "x"}, [], "prompt: got dict, expected a string, a list of messages"),
        (["x"], [], "got str, expected a mapping of role, content"),
        ([{"role": "user"}], [], "got a mapping of role, expected a mapping of role, content"),
        ([{"role": "user", "content": "x", "id": "y"}], [], "got a mapping of role, content, id"),
        ([{"from": "human", "value": "x"}], [], "got a mapping of from, value, expected a mapping of role, content"),
        ([{"role": "user", "content": 3}], [], "got int as content, expected a string or a list"),
        ([{"role": "robot", "content": "x"}], [], "got role 'robot', expected system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], [], "expected system, user, assistant"),
        ([user("x")], [], r"messages\[0\] item 0: got str, expected a mapping with a type"),
        ([user({"type": "audio", "audio": "a"})], [], "got type 'audio', expected text, image, video"),
        ([user({"type": []})], [], "expected text, image, video"),
        ([user({"type": "image", "image": "a", "fps": 9})], [], "got fps, expected no keys but type, image"),
        ([user({"type": "image", "image": "a", "url": "b"})], [], "got image, url, expected one of them"),
        ([user({"type": "image", "image": "a", "max_pixels": 0})], [], "got max_pixels 0, expected an integer above 0"),
        (
            [user({"type": "image", "image": "a", "resized_height": 9})],
            [],
            "resized_width, or neither",
        ),
        ([user({"type": "image", "base64": "%"})], [], "messages.0. item 0: not valid base64"),
        ([user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}})], [], "got detail 'low'"),
        ([user({"type": "image_url", "image_url": {"uri": "a"}})], [], "got a mapping of uri as image_url"),
        ([user({"type": "input_image", "file_id": "a"})], [], "got file_id, expected no keys but"),
        ([user({"type": "video", "video": "a", "raw_fps": 30})], [], "got raw_fps, expected no keys but type, video"),
        ([user({"type": "video", "video": "a", "fps": 1, "sample_fps": 2})], [], "expected one name for each setting"),
        ([user({"type": "video", "video": "a", "nframes": 1.5})], [], "got nframes 1.5, expected an integer above 0"),
        (
            [user({"type": "video", "video": "a", "video_start": -1})],
            [],
            "video_start -1, expected a number at least 0",
        ),
        (
            [user({"type": "video", "video": "a", "timestamps": "no"})],
            [],
            "got timestamps 'no', expected true or false",
        ),
        ([user({"type": "text", "text": 3})], [], "got int as text"),
        ([user({"type": "video", "video": "a", "fps": 0})], [], "got fps 0, expected a number above 0"),
        ([user({"type": "video", "video": "a", "fps": float("nan")})], [], "got fps nan"),
        ([user(text("x")), {"role": "assistant", "content": "y"}], [], "the last one is the assistant's"),
        ("half \ud83d", [], "prompt: character 5 is half of a surrogate pair"),
    ],
)
def test_a_prompt_that_cannot_be_read_says_what_was_expected(prompt, images, message):
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer().encode(prompt, images=images)


PIXELS = np.zeros((4, 4, 3), np.uint8)
SHAPES = {
    "transformers, url": {"type": "image", "url": "a.png"},
    "transformers, path": {"type": "image", "path": "a.png"},
    "OpenAI's chat": {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
    "OpenAI's chat, null detail": {"type": "image_url", "image_url": {"url": "a.png", "detail": None}},
    "Qwen's chat": {"type": "image_url", "image_url": "a.png"},
    "OpenAI's responses": {"type": "input_image", "image_url": "a.png", "detail": "high"},
    "no type": {"image": "a.png"},
    "no type, url": {"image_url": {"url": "a.png"}},
    "a row of a data set": {"type": "image", "image": "a.png", "text": None, "video": None, "fps": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_common_shape_of_an_image_is_read(shape):
    expected = chat_tokenizer().encode([user({"type": "image", "image": "a.png"}, text("Which?"))])
    for question in (text("Which?"), {"type": "input_text", "text": "Which?"}, {"text": "Which?", "image": None}):
        encoded = chat_tokenizer().encode([{"role": "user", "content": (SHAPES[shape], question)}])
        assert [(item.kind, item.source) for item in visual_items(encoded)] == [("image", "a.png")]
        assert encoded == expected


def test_base64_is_an_image_of_bytes():
    encoded = chat_tokenizer().encode([user({"type": "image", "base64": "aGF3aw"})])
    assert visual_items(encoded)[0].source == b"hawk"


@pytest.mark.parametrize("shape", ["video", "url", "path", "video_url"])
def test_every_setting_of_a_video_is_read(shape):
    item = {"type": "video", shape: "v.mp4", "nframes": np.int64(8), "video_start": 1, "video_end": np.float32(2.5)}
    item |= {"min_pixels": 784, "max_pixels": 50176, "total_pixels": 10**6, "resized_height": 56, "resized_width": 84}
    video = visual_items(chat_tokenizer().encode([user(item | {"timestamps": False})]))[0]
    assert (video.source, video.num_frames, video.start, video.end, video.timestamps) == ("v.mp4", 8, 1.0, 2.5, False)
    assert (video.min_pixels, video.max_pixels, video.total_pixels, video.resized) == (784, 50176, 10**6, (56, 84))
    item = {"type": "video_url", "video_url": {"url": "v.mp4"}, "sample_fps": 1, "min_frames": 4, "max_frames": 8}
    video = visual_items(chat_tokenizer().encode([user(item)]))[0]
    assert (video.source, video.fps, video.min_frames, video.max_frames) == ("v.mp4", 1.0, 4, 8)


@pytest.mark.parametrize(
    ("images", "sources"), [("a.png", ["a.png"]), (PIXELS, [PIXELS]), (np.stack([PIXELS, PIXELS]), [PIXELS, PIXELS])]
)
def test_one_image_needs_no_list(images, sources):
    encoded = chat_tokenizer().encode("Which?", images=images)
    assert len(visual_items(encoded)) == len(sources)
    assert all(np.array_equal(item.source, source) for item, source in zip(visual_items(encoded), sources, strict=True))


def test_one_video_needs_no_list():
    for video in ("v.mp4", np.zeros((2, 4, 4, 3), np.uint8)):
        assert len(visual_items(chat_tokenizer().encode("Which?", videos=video))) == 1


ANSWER = {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("message", "same"),
    [
        (ANSWER | {"annotations": [], "tool_calls": [], "refusal": None}, ANSWER),  # as OpenAI's client dumps it
        ({"role": "assistant", "content": [{"type": "output_text", "text": "red", "annotations": []}]}, ANSWER),
        (ANSWER | {"reasoning": "hm"}, ANSWER | {"reasoning_content": "hm"}),
        (ANSWER | {"thinking": "hm", "reasoning": "x"}, ANSWER | {"reasoning_content": "hm"}),
        (ANSWER | {"reasoning_content": "hm", "thinking": "x"}, ANSWER | {"reasoning_content": "hm"}),
        ({"role": "tool", "content": "3", "tool_call_id": None}, {"role": "tool", "content": "3"}),
    ],
)
def test_messages_as_other_servers_answer_them_are_read(message, same):
    template = VL_TEMPLATE.replace("{% endif %}<|im_end|>", "{% endif %}{{ message.reasoning_content }}<|im_end|>")
    tokenizer = chat_tokenizer(template=template)
    ids = [ids_of(tokenizer, [user(text("Which?")), one, user(text("And?"))]).tolist() for one in (message, same)]
    assert ids[0] == ids[1]


def test_keys_without_a_value_and_no_content_are_no_keys_and_an_empty_text():
    echoed = {"role": "assistant", "content": "red", "refusal": None, "tool_calls": None, "audio": None}
    question = {"role": "user", "content": "And now?"}
    plain = ids_of(chat_tokenizer(), [question, {"role": "assistant", "content": "red"}, question]).tolist()
    assert ids_of(chat_tokenizer(), [question, echoed, question]).tolist() == plain
    nothing, empty = ([{"role": "system", "content": content}, question] for content in (None, ""))
    assert ids_of(chat_tokenizer(), nothing).tolist() == ids_of(chat_tokenizer(), empty).tolist()


def test_the_names_of_openai_and_none_in_the_place_of_images():
    newer, older = ([{"role": role, "content": "Be brief."}, user(text("x"))] for role in ("developer", "system"))
    assert ids_of(chat_tokenizer(), newer).tolist() == ids_of(chat_tokenizer(), older).tolist()
    assert visual_items(chat_tokenizer().encode("Which?", images=None, videos=None)) == []
    url = "data:image/png;base64,iVBORw0KGgo="
    assert visual_items(chat_tokenizer().encode([user({"type": "image", "base64": url})]))[0].source == url
