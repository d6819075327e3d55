"""Where two files of a checkpoint say the same thing, the file counts that counts in transformers."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from export.checkpoint_files import SMALL_FILES, added_tokens, read_small_files, stop_tokens
from hawk_trt.errors import CheckpointError

TINY = Path(__file__).parents[2] / "examples" / "tiny-vlm"
TEMPLATE = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
TEMPLATE_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.fixture
def checkpoint(tmp_path):
    """The small files of the tiny checkpoint, without a chat template."""
    for name in SMALL_FILES:
        if (TINY / name).is_file() and name != "chat_template.jinja":
            shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def edit(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def put_template(folder, name, text):
    if name.endswith(".jinja"):
        (folder / name).write_text(text, encoding="utf-8")
    else:
        edit(folder / name, chat_template=text)


def resized(folder, name, side):
    """Settings that allow a picture of one size alone, in a file or under a key of processor_config.json."""
    settings = json.loads((TINY / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["size"] = {"shortest_edge": side**2, "longest_edge": side**2}
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    else:
        edit(folder / "processor_config.json", **{name: settings})


@pytest.mark.parametrize("names", list(itertools.combinations(TEMPLATE_FILES, 2)), ids="+".join)
def test_of_two_chat_templates_transformers_takes_the_same(checkpoint, names):
    utils = pytest.importorskip("transformers.processing_utils")
    for name in names:
        put_template(checkpoint, name, f"{TEMPLATE}{{# {name} #}}")
    small = read_small_files(checkpoint)
    assert names[0] in small.notes[0] and names[1] in small.notes[0]
    ours = small.contents["chat_template.jinja"].decode()
    assert ours == f"{TEMPLATE}{{# {names[0]} #}}"
    # tokenizer_config.json, which only a tokenizer reads, comes last
    assert utils.ProcessorMixin.get_processor_dict(checkpoint)[0].get("chat_template") == ours


def test_equal_chat_templates_are_no_matter_of_note(checkpoint):
    for name in TEMPLATE_FILES:
        put_template(checkpoint, name, TEMPLATE)
    small = read_small_files(checkpoint)
    assert not small.notes
    assert small.contents["chat_template.jinja"].decode() == TEMPLATE


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
        ({"default": "d", "tools": "t"}, "d"),
        (None, None),
    ],
)
def test_the_default_of_several_templates_counts(checkpoint, found, expected):
    edit(checkpoint / "tokenizer_config.json", chat_template=found)
    contents = read_small_files(checkpoint).contents
    assert contents.get("chat_template.jinja") == (None if expected is None else expected.encode())


def test_a_familys_own_template_counts_before_the_tokenizers(checkpoint):
    put_template(checkpoint, "tokenizer_config.json", "text only")
    assert read_small_files(checkpoint, "family").contents["chat_template.jinja"] == b"family"
    put_template(checkpoint, "chat_template.jinja", "own")
    assert read_small_files(checkpoint, "family").contents["chat_template.jinja"] == b"own"


@pytest.mark.parametrize(
    "names", [("image_processor",), ("preprocessor_config.json",), ("image_processor", "preprocessor_config.json")]
)
def test_image_settings_come_from_the_file_of_transformers(checkpoint, names):
    transformers = pytest.importorskip("transformers")
    (checkpoint / "preprocessor_config.json").unlink()
    for number, name in enumerate(names):
        resized(checkpoint, name, 112 * (number + 1))
    small = read_small_files(checkpoint)
    size = json.loads(small.contents["preprocessor_config.json"])["size"]
    assert size == dict(transformers.AutoImageProcessor.from_pretrained(checkpoint).size)
    assert size["longest_edge"] == 112**2
    assert bool(small.notes) == (len(names) == 2)
    assert "processor_config.json" not in small.contents


@pytest.mark.parametrize(
    "names",
    [("video_processor",), ("video_preprocessor_config.json",), ("video_processor", "video_preprocessor_config.json")],
)
def test_video_settings_come_from_the_file_of_transformers(checkpoint, names):
    utils = pytest.importorskip("transformers.video_processing_utils")
    for number, name in enumerate(names):
        resized(checkpoint, name, 112 * (number + 1))
    small = read_small_files(checkpoint)
    size = json.loads(small.contents["video_preprocessor_config.json"])["size"]
    assert size == utils.BaseVideoProcessor.get_video_processor_dict(checkpoint)[0]["size"]
    assert size["longest_edge"] == 112**2


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_tokenizers_stop_token_joins_those_of_the_configs(checkpoint, token):
    edit(checkpoint / "tokenizer_config.json", eos_token=token)
    end = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["text_config"]["eos_token_id"]
    assert stop_tokens(checkpoint, (3, 5), added_tokens(checkpoint)) == (3, 5, end)
    assert stop_tokens(checkpoint, (end, 5), added_tokens(checkpoint)) == (end, 5)


def test_a_stop_token_that_the_tokenizer_lacks_ends_nothing(checkpoint):
    edit(checkpoint / "tokenizer_config.json", eos_token="<|none|>")
    assert stop_tokens(checkpoint, (3,), added_tokens(checkpoint)) == (3,)


DAMAGED = {
    "half": b'{"a": ',
    "list": b"[]",
    "text": b"not json",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "binary": bytes(range(256)),
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize(
    "name", ["processor_config.json", "chat_template.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_a_damaged_file_is_one_clear_error(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_small_files(checkpoint)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("processor_config.json", {"image_processor": [1]}),
        ("processor_config.json", {"video_processor": "x"}),
        ("processor_config.json", {"chat_template": 3}),
        ("chat_template.json", {"chat_template": {"a": "x", "b": "y"}}),
        ("tokenizer_config.json", {"chat_template": [1, 2]}),
        ("tokenizer_config.json", {"chat_template": [{"name": [], "template": 1}]}),
        ("tokenizer.json", {"added_tokens": [{"content": 3}]}),
        ("tokenizer.json", {"added_tokens": 7}),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_file(checkpoint, name, changes):
    edit(checkpoint / name, **changes)
    with pytest.raises(CheckpointError, match=name):
        read_small_files(checkpoint)
