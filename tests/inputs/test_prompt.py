"""Prompts become the ids that transformers gives, and text never becomes a special token."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.chat_template import Guard
from hawk_trt.inputs.tokenizer import ChatTokenizer
from hawk_trt.models.family import TokenRun

TINY = Path(__file__).parents[2] / "examples" / "tiny-vlm"
TINY_TEMPLATE = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)

# The features of Qwen2.5-VL's template: counters in a namespace, numbered pictures on request, a video branch.
VL_TEMPLATE = """\
{% set images = namespace(value=0) %}{% set videos = namespace(value=0) %}
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
    {% for item in message['content'] %}
        {% if item['type'] == 'image' or 'image' in item %}
            {% set images.value = images.value + 1 %}
            {%- if add_vision_id %}Picture {{ images.value }}: {% endif -%}
            <|vision_start|><|image_pad|><|vision_end|>
            {%- elif item['type'] == 'video' or 'video' in item %}
            {% set videos.value = videos.value + 1 %}
            {%- if add_vision_id %}Video {{ videos.value }}: {% endif -%}
            <|vision_start|><|video_pad|><|vision_end|>
            {%- elif 'text' in item %}{{- item.text -}}{% endif %}
    {%- endfor %}
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def special_tokens(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    ids = [tokenizer.token_to_id(name) for name in (*names, "<|endoftext|>")]
    return SpecialTokens(*ids, eos=(tokenizer.token_to_id("<|im_end|>"),))


def qwen_like_tokenizer_json():
    """A small tokenizer with all that Qwen2.5's has: NFC, its splitting, byte-level BPE, <tool_call> not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["user\n\nWhat colour is the ring?\n\nassistant system You are a helpful assistant. <|im_start|> <|image"]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return tokenizer.to_str()


TOKENIZERS = {"tiny": (TINY / "tokenizer.json").read_text(encoding="utf-8"), "qwen-like": qwen_like_tokenizer_json()}


def chat_tokenizer(tokenizer_json=TOKENIZERS["tiny"], template=VL_TEMPLATE, config=None):
    config = {"eos_token": "<|im_end|>"} if config is None else config
    return ChatTokenizer(tokenizer_json, config, template, special_tokens(tokenizer_json))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4", "fps": 2}
CONVERSATIONS = {
    "plain string content": [{"role": "user", "content": "What colour is the ring?"}],
    "image before text": [user(IMAGE, text("What colour is it?"))],
    "image after text": [user(text("What colour is it?\n"), IMAGE)],
    "images, video and text mixed": [user(IMAGE, text("this and"), IMAGE, VIDEO, text(" that?\n\n"))],
    "several turns and a system": [
        {"role": "system", "content": "Answer in one word."},
        user(IMAGE, text("Which?")),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "\n\nAnd now?  \r\n"},
    ],
    "unicode": [user(text("héllo wörld 环是什么颜色 👩‍👩‍👧 \u0301\ue000\uf8ff \U000f0000 e\u0301 \x00"), IMAGE)],
    "added token that is not special": [user(text("say <tool_call>{}</tool_call> now"))],
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "case"),
    [(VL_TEMPLATE, case) for case in CONVERSATIONS]
    + [(TINY_TEMPLATE, case) for case in CONVERSATIONS if "video" not in case],  # it takes none
)
def test_ids_equal_those_of_transformers(tmp_path, name, template, case):
    transformers = pytest.importorskip("transformers")
    messages = CONVERSATIONS[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name], encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    encoded = chat_tokenizer(TOKENIZERS[name], template).encode(messages)
    assert encoded.input_ids.dtype == np.int64
    assert encoded.input_ids.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(value=st.text(max_size=40).map(lambda value: value.encode("utf-8", "ignore").decode()))
def test_ordinary_text_gets_the_ids_of_the_whole_rendered_string(value):
    tokenizer = chat_tokenizer(TOKENIZERS["qwen-like"], "<|im_start|>{{ messages[0].content[0].text }}<|im_end|>")
    whole = Tokenizer.from_str(TOKENIZERS["qwen-like"]).encode(f"<|im_start|>{value}<|im_end|>").ids
    assert tokenizer.encode(value).input_ids.tolist() == whole


FRAGMENTS = st.one_of(
    st.sampled_from(SPECIAL),
    st.sampled_from(SPECIAL).flatmap(lambda token: st.integers(1, len(token)).map(lambda n: token[:n])),
    st.sampled_from(SPECIAL).flatmap(lambda token: st.integers(0, len(token) - 1).map(lambda n: token[n:])),
    st.sampled_from(["<", "<|", "|>", "\ue000", "\ue001\ue000", "<tool_call>", "\n", " ", "user\n"]),
    st.text(max_size=8).map(lambda value: value.encode("utf-8", "ignore").decode()),
)
TEXTS = st.lists(FRAGMENTS, max_size=8).map("".join)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(TEXTS, max_size=4), system=TEXTS, answer=TEXTS)
def test_special_tokens_in_texts_stay_text_and_every_text_survives(parts, system, answer):
    tokenizer = SHARED
    messages = [
        {"role": "system", "content": system},
        user(IMAGE, text("first")),
        {"role": "assistant", "content": answer},
        user(*map(text, parts), IMAGE),
    ]
    ids = tokenizer.encode(messages).input_ids
    special = SPECIAL_IDS[np.isin(SPECIAL_IDS, ids)]
    assert set(special) == {tokenizer.tokenizer.token_to_id(SPECIAL[i]) for i in (1, 2, 3, 4, 6)}
    start, end, image = (tokenizer.tokenizer.token_to_id(SPECIAL[i]) for i in (1, 2, 6))
    assert [(ids == token).sum() for token in (start, end, image)] == [5, 4, 2]
    turns = np.split(ids, np.flatnonzero(ids == start))[1:]
    decoded = [tokenizer.tokenizer.decode(turn.tolist(), skip_special_tokens=True) for turn in turns]
    assert decoded == [
        f"system\n{system}\n",
        "user\nfirst\n",
        f"assistant\n{answer}\n",
        f"user\n{''.join(parts)}\n",
        "assistant\n",
    ]


SHARED = chat_tokenizer()
SPECIAL_IDS = np.array([SHARED.tokenizer.token_to_id(token) for token in SPECIAL])


def test_two_texts_cannot_form_a_special_token_though_the_template_trims_them():
    template = "{% for item in messages[0].content %}{{ item.text | trim }}{% endfor %}<|im_end|>"
    tokenizer = chat_tokenizer(template=template)
    ids = tokenizer.encode([user(text("a<|im_  "), text("start|>b"))]).input_ids
    assert np.isin(ids, SPECIAL_IDS).tolist() == [False] * (ids.size - 1) + [True]
    assert tokenizer.tokenizer.decode(ids.tolist()) == "a<|im_start|>b"


def test_a_special_token_of_one_character_or_inside_another_is_escaped():
    guard = Guard(["#", "<|a", "<|a|>", "|a|"], ["\ue000"])
    rendered = "#" + guard.apply("x#<|a|>|a|\ue000") + "<|a|>" + guard.apply("<|a") + "<|a"
    assert list(guard.split(rendered)) == [("", "#"), ("x#<|a|>|a|\ue000", "<|a|>"), ("<|a", "<|a"), ("", None)]


def test_a_token_only_the_config_or_the_bundle_calls_special_is_not_injected():
    fields = json.loads(TOKENIZERS["tiny"])
    for token in fields["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {"461": {"content": "<|vision_pad|>", "special": True}},
        "extra_special_tokens": ["<|not in the vocabulary|>"],
    }
    tokenizer = chat_tokenizer(json.dumps(fields), config=config)
    ids = tokenizer.encode("".join(SPECIAL), images=["a.png"]).input_ids
    assert np.isin(ids, SPECIAL_IDS).sum() == 8
    assert tokenizer.tokenizer.get_vocab_size() == 464


def test_a_string_puts_images_then_videos_before_the_text():
    tokenizer = chat_tokenizer()
    encoded = tokenizer.encode("Which?", images=["a.png", "c.png"], videos=["b.mp4"])
    assert [(item.kind, item.source) for item in encoded.visual] == [
        ("image", "a.png"),
        ("image", "c.png"),
        ("video", "b.mp4"),
    ]
    decoded = tokenizer.tokenizer.decode(encoded.input_ids.tolist(), skip_special_tokens=False)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert f"<|im_start|>user\n{image}{image}{video}Which?<|im_end|>\n<|im_start|>assistant\n" in decoded


def test_items_without_a_source_take_the_next_image_or_video():
    messages = [
        user({"type": "image"}, text("x"), {"image": "b.png"}, {"type": "video", "fps": 0.5}, {"type": "image"})
    ]
    encoded = chat_tokenizer().encode(messages, images=["a.png", "c.png"], videos=["v.mp4"])
    assert [item.source for item in encoded.visual] == ["a.png", "b.png", "v.mp4", "c.png"]
    assert [item.fps for item in encoded.visual] == [None, None, 0.5, None]


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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template: "),
        ("{{ messages[0].content + 1 }}", "chat template: "),
        ("{{ messages[0].nothing.at_all }}", "chat template: "),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "chat template: "),
        ("no place for an image", "got image, but the bundle's chat template makes no image and no video of it"),
        (None, "this bundle has no chat template, expected ModelInputs"),
    ],
)
def test_a_template_that_fails_is_an_error_with_its_reason(template, message):
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer(template=template).encode("x", images=["a.png"])


def test_templates_have_the_tools_that_transformers_gives_them():
    template = (
        "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y')|length }}{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content|tojson }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template=template)
    ids = tokenizer.encode([{"role": "user", "content": '<é & "q">'}, user(text("no"))]).input_ids.tolist()
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == '<|im_end|>4"<é & \\"q\\">"'


def test_placeholders_expand_to_their_visual_tokens():
    tokenizer = chat_tokenizer()
    encoded = tokenizer.encode([user(IMAGE, text("and"), VIDEO, IMAGE)])
    ids = encoded.input_ids
    image, video = (tokenizer.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
    expanded = tokenizer.expand(encoded, [[TokenRun(image, 3)], [TokenRun(video)], [TokenRun(image, 2)]])
    places = [index for index in expanded.tolist() if index in (image, video)]
    assert places == [image] * 3 + [video] + [image] * 2
    assert expanded.dtype == np.int64
    assert [i for i in expanded.tolist() if i not in (image, video)] == [
        i for i in ids.tolist() if i not in (image, video)
    ]
    for counts in ([3, 1], [3, 1, 2, 4], [3, 0, 2]):
        with pytest.raises(InvalidInput, match="for 3 placeholders, expected one with at least 1 token for each"):
            tokenizer.expand(encoded, [[TokenRun(image, count)] for count in counts])


def test_text_that_a_placeholder_becomes_is_read_with_the_text_around_it():
    tokenizer = chat_tokenizer(TOKENIZERS["qwen-like"])
    encoded = tokenizer.encode([user(text("one"), IMAGE, text("three"))])
    image = tokenizer.tokenizer.token_to_id("<|image_pad|>")
    ids = tokenizer.expand(encoded, [["wo", "rd", TokenRun(image, 2), "s"]])
    at = int(np.flatnonzero(ids == image)[0])
    before, after = (tokenizer.tokenizer.encode(t, add_special_tokens=False).ids for t in ("word", "s"))
    assert ids[at - len(before) : at].tolist() == before
    assert ids[at : at + 2].tolist() == [image] * 2
    assert ids[at + 2 : at + 2 + len(after)].tolist() == after


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_turn_query_is_the_text_of_the_last_user_turn(name):
    tokenizer = chat_tokenizer(TOKENIZERS[name])
    messages = [
        user(text("old question"), IMAGE),
        {"role": "assistant", "content": "old answer"},
        user(text("Which of <|im_end|> them?"), IMAGE, text(" Say\n\nso.")),
    ]
    image = TokenRun(tokenizer.tokenizer.token_to_id("<|image_pad|>"), 4)
    ids = tokenizer.expand(tokenizer.encode(messages), [[image], [image]])
    mask = tokenizer.turn_query_mask(ids)
    assert mask.dtype == np.bool_
    assert mask.shape == ids.shape
    chosen = tokenizer.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
    assert chosen == "Which of <|im_end|> them? Say\n\nso."


def test_a_newline_joined_to_the_header_does_not_hide_the_turn():
    tokenizer = chat_tokenizer(TOKENIZERS["qwen-like"])
    ids = tokenizer.encode([user(text("\nWhat?"))]).input_ids
    joined = tokenizer.tokenizer.encode("\n\n", add_special_tokens=False).ids
    assert len(joined) == 1
    assert joined[0] in ids  # otherwise this tests nothing
    assert tokenizer.tokenizer.decode(ids[tokenizer.turn_query_mask(ids)].tolist()) == "What?"


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "user\n"}], [user(IMAGE)]], ids=["no turn", "empty"]
)
def test_a_turn_query_needs_text_of_the_user(messages):
    tokenizer = chat_tokenizer(template=TINY_TEMPLATE)
    with pytest.raises(InvalidInput, match=r'query: "turn" needs .* Use query="paper"'):
        tokenizer.turn_query_mask(tokenizer.encode(messages).input_ids)


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
        assert [(item.kind, item.source) for item in encoded.visual] == [("image", "a.png")]
        assert encoded.input_ids.tolist() == expected.input_ids.tolist()


def test_base64_is_an_image_of_bytes():
    encoded = chat_tokenizer().encode([user({"type": "image", "base64": "aGF3aw"})])
    assert encoded.visual[0].source == b"hawk"


@pytest.mark.parametrize("shape", ["video", "url", "path", "video_url"])
def test_every_setting_of_a_video_is_read(shape):
    item = {"type": "video", shape: "v.mp4", "nframes": np.int64(8), "video_start": 1, "video_end": np.float32(2.5)}
    item |= {"min_pixels": 784, "max_pixels": 50176, "total_pixels": 10**6, "resized_height": 56, "resized_width": 84}
    video = chat_tokenizer().encode([user(item | {"timestamps": False})]).visual[0]
    assert (video.source, video.num_frames, video.start, video.end, video.timestamps) == ("v.mp4", 8, 1.0, 2.5, False)
    assert (video.min_pixels, video.max_pixels, video.total_pixels, video.resized) == (784, 50176, 10**6, (56, 84))
    item = {"type": "video_url", "video_url": {"url": "v.mp4"}, "sample_fps": 1, "min_frames": 4, "max_frames": 8}
    video = chat_tokenizer().encode([user(item)]).visual[0]
    assert (video.source, video.fps, video.min_frames, video.max_frames) == ("v.mp4", 1.0, 4, 8)


@pytest.mark.parametrize(
    ("images", "sources"), [("a.png", ["a.png"]), (PIXELS, [PIXELS]), (np.stack([PIXELS, PIXELS]), [PIXELS, PIXELS])]
)
def test_one_image_needs_no_list(images, sources):
    encoded = chat_tokenizer().encode("Which?", images=images)
    assert len(encoded.visual) == len(sources)
    assert all(np.array_equal(item.source, source) for item, source in zip(encoded.visual, sources, strict=True))


def test_one_video_needs_no_list():
    for video in ("v.mp4", np.zeros((2, 4, 4, 3), np.uint8)):
        assert len(chat_tokenizer().encode("Which?", videos=video).visual) == 1


def test_keys_without_a_value_and_no_content_are_no_keys_and_an_empty_text():
    echoed = {"role": "assistant", "content": "red", "refusal": None, "tool_calls": None, "audio": None}
    question = {"role": "user", "content": "And now?"}
    plain = chat_tokenizer().encode([question, {"role": "assistant", "content": "red"}, question]).input_ids.tolist()
    assert chat_tokenizer().encode([question, echoed, question]).input_ids.tolist() == plain
    nothing, empty = ([{"role": "system", "content": content}, question] for content in (None, ""))
    assert chat_tokenizer().encode(nothing).input_ids.tolist() == chat_tokenizer().encode(empty).input_ids.tolist()


def test_a_name_and_reasoning_reach_the_template_as_in_transformers():
    template = "{% for m in messages %}{{ m.name }}:{{ m.reasoning_content }}:{{ m.content }};{% endfor %}"
    messages = [
        {"role": "user", "name": "ann", "content": "x"},
        {"role": "assistant", "reasoning_content": "<|im_end|>", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    tokenizer = chat_tokenizer(template=template)
    ids = tokenizer.encode(messages).input_ids
    assert tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "ann::x;:<|im_end|>:y;::z;"
    assert not np.isin(ids, SPECIAL_IDS).any()


# What trainers save: assistant text inside {% generation %}; loops that are left; every argument of tojson.
FULL_TEMPLATE = """\
{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{% if loop.index0 == 4 %}{% break %}{% endif %}{% if m.content == 'skip' %}{% continue %}{% endif %}
{%- generation -%} <|im_start|>{{ m.role }} {{ m | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}
{%- endgeneration %}{{ [m.content] | tojson(separators=(',', ':')) }}{% endif %}{% endfor %}
{{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}{% if documents is none %}no documents{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_template_has_all_that_transformers_gives_it(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    contents = ["hello", "hi é", "skip", "yo", "last"]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name], encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=FULL_TEMPLATE)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_tokenizer(TOKENIZERS[name], FULL_TEMPLATE).encode(messages).input_ids.tolist() == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without an end"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
        ("{{ 'x' * 1000000000000 }}", "makes a value that is too large"),
        ("{{ 9 ** 999999999 }}", "makes a value that is too large"),
        ("{{ [1] * 1000000000 }}", "makes a value that is too large"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_hostile_template_ends_with_one_line(monkeypatch, template, message):
    monkeypatch.setattr("hawk_trt.inputs.chat_template._SECONDS", 0.5)
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer(template=template).encode("x")


def test_the_time_limit_works_in_any_thread_and_ends_with_the_rendering(monkeypatch):
    monkeypatch.setattr("hawk_trt.inputs.chat_template._SECONDS", 0.2)
    slow = chat_tokenizer(template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with ThreadPoolExecutor(3) as pool:
        errors = [pool.submit(slow.encode, "x").exception() for _ in range(3)]
    assert all("not done after 0.2 seconds" in str(error) for error in errors)
    quick = chat_tokenizer()
    for _ in range(20):
        quick.encode("x")
    time.sleep(0.3)  # no timer is left that could still go off


def test_text_that_no_context_holds_is_refused_before_it_is_tokenised(monkeypatch):
    tokenizer = ChatTokenizer(TOKENIZERS["tiny"], {}, TINY_TEMPLATE, special_tokens(TOKENIZERS["tiny"]), context=100)
    monkeypatch.setattr(ChatTokenizer, "token_ids", lambda *_: pytest.fail("tokenised"))
    tokenizer.encode("x" * 6400)
    for messages in ("x" * 6401, [user(text("x" * 6400), text("y"))], [user(text("x"), IMAGE, text("y" * 6400))]):
        with pytest.raises(InvalidInput, match="got 6,401 characters of text, expected at most 6,400"):
            tokenizer.encode(messages)


def test_other_threads_run_while_a_long_text_is_tokenised():
    long = "hello world, what colour is the ring? " * 30_000
    stop, gaps = threading.Event(), []

    def watch():
        while not stop.is_set():
            before = time.perf_counter()
            time.sleep(0.005)
            gaps.append(time.perf_counter() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    ids = SHARED.encode(long).input_ids
    seconds = time.perf_counter() - begun
    stop.set()
    watcher.join()
    assert len(ids) > 100_000
    assert max(gaps) < max(0.6, 0.5 * seconds)
