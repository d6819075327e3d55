"""A bundle's tokenizer and template, read from its files."""

from types import SimpleNamespace

import pytest
from test_prompt import TINY, TINY_TEMPLATE, TOKENIZERS, chat_tokenizer, special_tokens

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError
from hawk_trt.inputs.tokenizer import ChatTokenizer


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
    encoded = ChatTokenizer.from_bundle(bundle).encode("Which?", images=["a.png"])
    assert (
        encoded.input_ids.tolist()
        == chat_tokenizer(template=TINY_TEMPLATE).encode("Which?", ["a.png"]).input_ids.tolist()
    )


def test_a_bundle_without_a_tokenizer_gives_none(tmp_path):
    assert ChatTokenizer.from_bundle(bundle_of(tmp_path, {})) is None


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_tokenizer_config_is_a_bundle_error(tmp_path, content):
    bundle = bundle_of(tmp_path, {"tokenizer.json": TOKENIZERS["tiny"], "tokenizer_config.json": content})
    with pytest.raises(BundleError, match=r"tokenizer_config.json: .* make export"):
        ChatTokenizer.from_bundle(bundle)


def test_a_tokenizer_file_of_another_make_is_a_bundle_error():
    with pytest.raises(BundleError, match="cannot read it"):
        ChatTokenizer('{"version": "9"}', {}, None, special_tokens(TOKENIZERS["tiny"]))
