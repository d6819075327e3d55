"""Streamed pieces are whole characters, make up the text, and the text ends where it should."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from hawk_trt.answer import Answer
from hawk_trt.errors import InvalidInput

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parent.parent / "examples" / "tiny-vlm" / "tokenizer.json"))
EOS = TOKENIZER.token_to_id("<|im_end|>")


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def bytes_of(text):
    """One token for each byte of a text."""
    letters = Tokenizer(models.BPE(dict(TOKENIZER.get_vocab(with_added_tokens=False)), []))
    letters.pre_tokenizer = TOKENIZER.pre_tokenizer
    return letters.encode(text).ids


def pushed(answer, ids):
    pieces = []
    for token_id in ids:
        if answer.finished:
            break
        pieces.append(answer.push(token_id))
    return [*pieces, answer.flush()]


IDS = st.lists(st.one_of(st.integers(0, 470), st.sampled_from(bytes_of("é環👩\ufffd"))), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_pieces_of_any_tokens_make_up_their_decoded_text(ids):
    answer = Answer(TOKENIZER, eos=())
    pieces = pushed(answer, ids)
    assert "".join(pieces) == answer.text == TOKENIZER.decode(ids)
    assert answer.token_ids == ids
    assert answer.finish_reason == "length"


@settings(max_examples=300, deadline=None)
@given(text=st.text("abcé環", max_size=20), stop=st.lists(st.text("abcé環", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    expected = text if not ends else text[: sum(min(ends))]
    for ids in (ids_of(text), bytes_of(text)):
        answer = Answer(TOKENIZER, eos=(), stop=stop)
        pieces = pushed(answer, ids)
        assert "".join(pieces) == answer.text == expected
        assert answer.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("ids", [ids_of("user"), bytes_of("user")], ids=["one token", "bytes"])
def test_of_two_stop_strings_the_one_complete_first_counts_though_it_starts_later(ids):
    answer = Answer(TOKENIZER, eos=(), stop=["user", "se"])
    assert "".join(pushed(answer, ids)) == "u"


def test_a_piece_never_holds_half_a_character():
    answer = Answer(TOKENIZER, eos=())
    pieces = [answer.push(token_id) for token_id in bytes_of("né環!")]
    assert pieces == ["n", "", "é", "", "", "環", "!"]


def test_bytes_that_never_become_a_character_come_with_the_end():
    answer = Answer(TOKENIZER, eos=(EOS,))
    assert [answer.push(token_id) for token_id in [*bytes_of("a環")[:3], EOS]] == ["a", "", "", "\ufffd"]


def test_what_could_begin_a_stop_string_is_held_back():
    answer = Answer(TOKENIZER, eos=(), stop=["###", "#!"])
    assert [answer.push(token_id) for token_id in bytes_of("a##b##")] == ["a", "", "", "##b", "", ""]
    assert answer.text == "a##b"
    assert answer.flush() == "##"
    assert answer.text == "a##b##"
    assert answer.flush() == ""


def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_in_it():
    answer = Answer(TOKENIZER, eos=(EOS,), stop=["END"])
    pieces = [answer.push(token_id) for token_id in bytes_of("red END")]
    assert "".join(pieces) == answer.text == "red "
    assert answer.finished
    assert answer.finish_reason == "stop"
    assert answer.flush() == ""


def test_a_stop_token_ends_the_answer_and_stays_out_of_the_text():
    answer = Answer(TOKENIZER, eos=(EOS, 460), stop=["red!"])
    assert [answer.push(token_id) for token_id in bytes_of("red")] == ["", "", ""]
    assert not answer.finished
    assert answer.push(EOS) == "red"
    assert (answer.text, answer.finish_reason) == ("red", "stop")
    assert answer.token_ids[-1] == EOS


def test_a_stop_token_that_is_an_ordinary_one_stays_out_too():
    period = ids_of(".")[0]
    answer = Answer(TOKENIZER, eos=(period,))
    assert "".join(pushed(answer, ids_of("red. blue"))) == "red"


def test_special_tokens_within_an_answer_are_left_out():
    image = TOKENIZER.token_to_id("<|image_pad|>")
    answer = Answer(TOKENIZER, eos=())
    assert "".join(pushed(answer, [image, *ids_of("a"), image, *ids_of(" b")])) == "a b"


def test_a_decoder_that_drops_the_first_space_keeps_the_others():
    vocabulary = {"▁red": 0, "▁ring": 1, "s": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    ids = [4, 0, 4, 1, 2, 0]
    assert pushed(Answer(tokenizer, eos=()), ids) == ["", "red", "", " ring", "s", " red", ""]


def test_without_a_tokenizer_there_are_only_ids():
    answer = Answer(None, eos=(9,))
    assert [answer.push(token_id) for token_id in (1, 2, 9)] == ["", "", ""]
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
        Answer(tokenizer, eos=(), stop=stop)
