"""Streamed pieces are whole characters, make up the text, and the text ends where it should."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from hawk_trt import ModelInputs, PruningConfig, Request
from hawk_trt.errors import InvalidInput
from hawk_trt.sequence import Sequence

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parent.parent / "examples" / "tiny-vlm" / "tokenizer.json"))
EOS = TOKENIZER.token_to_id("<|im_end|>")


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def bytes_of(text):
    """One token for each byte of a text."""
    letters = Tokenizer(models.BPE(dict(TOKENIZER.get_vocab(with_added_tokens=False)), []))
    letters.pre_tokenizer = TOKENIZER.pre_tokenizer
    return letters.encode(text).ids


LAYOUT = SimpleNamespace(input_ids=[0])


def answer_of(tokenizer, ids, eos=(), stop=(), limit=10**6, **options):
    """A sequence that was given ids, and its pieces."""
    request = Request(ModelInputs([0]), stop=stop, **options)
    sequence = Sequence(request, request.prompt, PruningConfig(), LAYOUT, None, 1, limit, tokenizer, eos)
    pieces = []
    for token_id in ids:
        sequence.step(token_id, None)
        pieces.append(sequence.piece)
        if sequence.finished:
            break
    return sequence, pieces


IDS = st.lists(st.one_of(st.integers(0, 470), st.sampled_from(bytes_of("é環👩\ufffd"))), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_pieces_of_any_tokens_make_up_their_decoded_text(ids):
    answer, pieces = answer_of(TOKENIZER, ids, limit=len(ids))
    assert "".join(pieces) == answer.text == TOKENIZER.decode(ids)
    assert answer.token_ids == ids
    assert answer.finish_reason == "length"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abcé環", min_size=1, max_size=20),
    stop=st.lists(st.text("abcé環", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    expected = text if not ends else text[: sum(min(ends))]
    for ids in (ids_of(text), bytes_of(text)):
        answer, pieces = answer_of(TOKENIZER, ids, stop=stop, limit=len(ids))
        assert "".join(pieces) == answer.text == expected
        assert answer.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("ids", [ids_of("user"), bytes_of("user")], ids=["one token", "bytes"])
def test_of_two_stop_strings_the_one_complete_first_counts_though_it_starts_later(ids):
    assert "".join(answer_of(TOKENIZER, ids, stop=["user", "se"])[1]) == "u"


def test_a_piece_never_holds_half_a_character():
    assert answer_of(TOKENIZER, bytes_of("né環!"))[1] == ["n", "", "é", "", "", "環", "!"]


def test_bytes_that_never_become_a_character_come_with_the_end():
    assert answer_of(TOKENIZER, [*bytes_of("a環")[:3], EOS], eos=(EOS,))[1] == ["a", "", "", "\ufffd"]


def test_what_could_begin_a_stop_string_is_held_back():
    ids = bytes_of("a##b##")
    answer, pieces = answer_of(TOKENIZER, ids, stop=["###", "#!"])
    assert pieces == ["a", "", "", "##b", "", ""]
    assert answer.text == "a##b"
    assert not answer.finished
    answer, pieces = answer_of(TOKENIZER, ids, stop=["###", "#!"], limit=len(ids))
    assert pieces == ["a", "", "", "##b", "", "##"]
    assert (answer.text, answer.finish_reason) == ("a##b##", "length")


def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_in_it():
    answer, pieces = answer_of(TOKENIZER, bytes_of("red END"), eos=(EOS,), stop=["END"])
    assert "".join(pieces) == answer.text == "red "
    assert answer.finished
    assert answer.finish_reason == "stop"


def test_a_stop_token_ends_the_answer_and_stays_out_of_the_text():
    answer, pieces = answer_of(TOKENIZER, bytes_of("red"), eos=(EOS, 460), stop=["red!"])
    assert pieces == ["", "", ""]
    assert not answer.finished
    answer.step(EOS, None)
    assert answer.piece == "red"
    assert (answer.text, answer.finish_reason) == ("red", "stop")
    assert answer.token_ids[-1] == EOS


def test_a_stop_token_that_is_an_ordinary_one_stays_out_too():
    period = ids_of(".")[0]
    assert "".join(answer_of(TOKENIZER, ids_of("red. blue"), eos=(period,))[1]) == "red"


def test_special_tokens_within_an_answer_are_left_out():
    image = TOKENIZER.token_to_id("<|image_pad|>")
    assert "".join(answer_of(TOKENIZER, [image, *ids_of("a"), image, *ids_of(" b")])[1]) == "a b"


def test_a_decoder_that_drops_the_first_space_keeps_the_others():
    vocabulary = {"▁red": 0, "▁ring": 1, "s": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    ids = [4, 0, 4, 1, 2, 0]
    assert answer_of(tokenizer, ids)[1] == ["", "red", "", " ring", "s", " red"]


def test_without_a_tokenizer_there_are_only_ids():
    answer, pieces = answer_of(None, [1, 2, 9], eos=(9,))
    assert pieces == ["", "", ""]
    assert answer.text is None
    assert answer.token_ids == [1, 2, 9]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("tokenizer", "stop", "message"),
    [
        (None, ["x"], "stop strings need a tokenizer"),
        (TOKENIZER, "x", "stop: got 'x', expected a list of non-empty strings"),
        (TOKENIZER, ["x", ""], "expected a list of non-empty strings"),
        (TOKENIZER, [3], "expected a list of non-empty strings"),
    ],
)
def test_stop_strings_that_cannot_be_used_are_an_error(tokenizer, stop, message):
    with pytest.raises(InvalidInput, match=message):
        answer_of(tokenizer, [1], stop=stop)


def test_special_tokens_stay_in_the_text_where_they_are_the_answer():
    box = TOKENIZER.token_to_id("<|image_pad|>")
    ids = [box, *ids_of("12"), box]
    assert "".join(answer_of(TOKENIZER, ids, skip_special_tokens=False)[1]) == "<|image_pad|>12<|image_pad|>"
    assert "".join(answer_of(TOKENIZER, ids)[1]) == "12"
