"""Prompts become the ids that transformers gives, and text never becomes a special token."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.inputs.layout import query_mask
from hawk_trt.inputs.tokenizer import ChatTokenizer
from hawk_trt.models.family import TokenRun
from prompts import (
    IMAGE,
    SHARED,
    SPECIAL,
    SPECIAL_IDS,
    TINY,
    TINY_TEMPLATE,
    TOKENIZERS,
    VIDEO,
    VL_TEMPLATE,
    chat_tokenizer,
    ids_of,
    special_tokens,
    text,
    user,
)

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
    ids = ids_of(chat_tokenizer(TOKENIZERS[name], template), messages)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(value=st.text(max_size=40).map(lambda value: value.encode("utf-8", "ignore").decode()))
def test_ordinary_text_gets_the_ids_of_the_whole_rendered_string(value):
    tokenizer = chat_tokenizer(TOKENIZERS["qwen-like"], "<|im_start|>{{ messages[0].content[0].text }}<|im_end|>")
    whole = Tokenizer.from_str(TOKENIZERS["qwen-like"]).encode(f"<|im_start|>{value}<|im_end|>").ids
    assert ids_of(tokenizer, value).tolist() == whole


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
    ids = ids_of(tokenizer, messages)
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
    ids = ids_of(tokenizer, "".join(SPECIAL), images=["a.png"])
    assert np.isin(ids, SPECIAL_IDS).sum() == 8
    assert tokenizer.tokenizer.get_vocab_size() == 464


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("spelled", ["<|im_start|>", "<|im_end|>", "<|vision_end|>"])
def test_a_token_takes_the_white_space_beside_it_as_in_transformers(spelled, side, special):
    fields = json.loads(TOKENIZERS["tiny"])
    for token in fields["added_tokens"]:
        if token["content"] == spelled:
            token |= {side: True, "special": special}
    tokenizer = chat_tokenizer(json.dumps(fields), TINY_TEMPLATE)
    question = "  Which? \n"
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = Tokenizer.from_str(json.dumps(fields)).encode(rendered, add_special_tokens=False).ids
    assert ids_of(tokenizer, question, images=["a.png"]).tolist() == expected


def test_a_template_knows_the_tokens_that_the_config_names():
    config = {"extra_special_tokens": {"image_token": "<|image_pad|>", "boi": {"content": "<|vision_start|>"}}}
    template = "{{ boi }}{{ image_token }}{{ eos_token }}" + TINY_TEMPLATE.replace("<|image_pad|>", "")
    ids = ids_of(chat_tokenizer(template=template, config=config | {"eos_token": "<|im_end|>"}), "x", images=["a.png"])
    assert ids[:3].tolist() == [SHARED.tokenizer.token_to_id(SPECIAL[number]) for number in (3, 6, 2)]


def test_placeholders_expand_to_their_visual_tokens():
    tokenizer = chat_tokenizer()
    encoded = tokenizer.encode([user(IMAGE, text("and"), VIDEO, IMAGE)])
    ids = ids_of(tokenizer, [user(IMAGE, text("and"), VIDEO, IMAGE)])
    image, video = (tokenizer.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
    expanded = tokenizer.expand(encoded, [[TokenRun(image, 3)], [TokenRun(video)], [TokenRun(image, 2)]])
    places = [index for index in expanded.tolist() if index in (image, video)]
    assert places == [image] * 3 + [video] + [image] * 2
    assert expanded.dtype == np.int64
    assert [i for i in expanded.tolist() if i not in (image, video)] == [
        i for i in ids.tolist() if i not in (image, video)
    ]


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


def turn_query(tokenizer, ids):
    special, nothing = special_tokens(TOKENIZERS["tiny"]), np.zeros(ids.size, np.bool_)
    return query_mask(ids, nothing, special, "turn", tokenizer)[0]


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
    mask = turn_query(tokenizer, ids)
    assert mask.dtype == np.bool_
    assert mask.shape == ids.shape
    chosen = tokenizer.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
    assert chosen == "Which of <|im_end|> them? Say\n\nso."


def test_a_newline_joined_to_the_header_does_not_hide_the_turn():
    tokenizer = chat_tokenizer(TOKENIZERS["qwen-like"])
    ids = ids_of(tokenizer, [user(text("\nWhat?"))])
    joined = tokenizer.tokenizer.encode("\n\n", add_special_tokens=False).ids
    assert len(joined) == 1
    assert joined[0] in ids  # otherwise this tests nothing
    assert tokenizer.tokenizer.decode(ids[turn_query(tokenizer, ids)].tolist()) == "What?"


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "user\n"}], [user(IMAGE)]], ids=["no turn", "empty"]
)
def test_a_turn_query_needs_text_of_the_user(messages):
    tokenizer = chat_tokenizer(template=TINY_TEMPLATE)
    with pytest.raises(InvalidInput, match=r'query: "turn" needs .* Use query="paper"'):
        turn_query(tokenizer, ids_of(tokenizer, messages))


def test_text_that_no_context_holds_is_refused_before_it_is_tokenised(monkeypatch):
    tokenizer = ChatTokenizer(TOKENIZERS["tiny"], {}, TINY_TEMPLATE, special_tokens(TOKENIZERS["tiny"]), context=100)
    monkeypatch.setattr(ChatTokenizer, "token_ids", lambda *_: pytest.fail("tokenised"))
    tokenizer.encode("x" * 6400)
    for messages in ("x" * 6401, [user(text("x" * 6400), text("y"))], [user(text("x"), IMAGE, text("y" * 6400))]):
        with pytest.raises(InvalidInput, match="got 6,401 characters of text, expected at most 6,400"):
            tokenizer.encode(messages)


def test_other_threads_run_while_a_long_text_is_tokenised():
    long = "hello world, what colour is the ring? " * 30_000
    stop, gaps = threading.Event(), []  # in processor time of the process, which a busy machine does not stretch

    def watch():
        while not stop.is_set():
            before = time.process_time()
            time.sleep(0.005)
            gaps.append(time.process_time() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.process_time()
    ids = ids_of(SHARED, long)
    seconds = time.process_time() - begun
    stop.set()
    watcher.join()
    assert len(ids) > 100_000
    assert max(gaps) < 0.5 * seconds


def bundle_of(folder, texts):
    """A bundle as far as its text files go."""
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    manifest = SimpleNamespace(
        files=dict.fromkeys(texts),
        special_tokens=special_tokens(TOKENIZERS["tiny"]),
        language=SimpleNamespace(max_position_embeddings=1000),
    )
    return Bundle(folder, manifest)


def test_a_bundle_gives_its_tokenizer_and_template(tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    bundle = bundle_of(tmp_path, {name: (TINY / name).read_text(encoding="utf-8") for name in names})
    ids = ids_of(ChatTokenizer.from_bundle(bundle), "Which?", images=["a.png"])
    assert ids.tolist() == ids_of(chat_tokenizer(template=TINY_TEMPLATE), "Which?", ["a.png"]).tolist()


def test_a_bundle_without_a_tokenizer_gives_none(tmp_path):
    assert ChatTokenizer.from_bundle(bundle_of(tmp_path, {})) is None


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_tokenizer_config_is_a_bundle_error(tmp_path, content):
    bundle = bundle_of(tmp_path, {"tokenizer.json": TOKENIZERS["tiny"], "tokenizer_config.json": content})
    with pytest.raises(BundleError, match=r"tokenizer_config.json: .* hawk-trt export "):
        ChatTokenizer.from_bundle(bundle)


def test_a_text_that_the_tokenizers_pattern_never_ends_with_is_refused():
    fields = json.loads(TOKENIZERS["tiny"])
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = chat_tokenizer(json.dumps(fields | {"pre_tokenizer": split}), TINY_TEMPLATE)
    with pytest.raises(InvalidInput, match=r"cannot read this text \(.*retry-limit"):
        ids_of(tokenizer, "a" * 40 + "b")


def test_a_tokenizer_file_of_another_make_is_a_bundle_error():
    with pytest.raises(BundleError, match="cannot read it"):
        ChatTokenizer('{"version": "9"}', {}, None, special_tokens(TOKENIZERS["tiny"]))
