"""JSON from outside: read within bounds of size, depth and type, and refused in one sentence."""

import os
from typing import Any

import pytest

from export.tensor_file import read_tensor_file
from hawk_trt import files
from hawk_trt.errors import BundleError, CheckpointError, InvalidInput
from hawk_trt.files import parse_json, read_json
from hawk_trt.files.staging import write_atomically

Object = dict[str, Any]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.json: damaged \(.*\)\. Download it again"),
        (b'{"a": ', "damaged"),
        (b"[1]", "Expected `object`, got `array`"),
        (b'{"a": "\xff"}', "damaged"),
        (b"[" * 100_000 + b"]" * 100_000, "damaged"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels. Download it again"),
    ],
)
def test_json_that_cannot_be_used_is_refused_by_name_with_what_helps(content, message):
    with pytest.raises(CheckpointError, match=message):
        parse_json(content, Object, "a.json", CheckpointError, "Download it again")


def test_json_within_the_bounds_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": ' + b"[" * 60 + b"]" * 60 + b', "b": [1, {"c": 1e-6}]}')
    assert read_json(tmp_path / "a.json", Object, CheckpointError)["b"] == [1, {"c": 1e-6}]
    assert parse_json("[1, 2]", list[int], "a.json", CheckpointError) == [1, 2]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json", Object, CheckpointError) == {"a": 1}


def test_a_file_that_is_not_there_or_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    with pytest.raises(BundleError, match=r"a\.json: cannot be read \(No such file"):
        read_json(tmp_path / "a.json", Object, BundleError)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 10 + b"]")
    with pytest.raises(BundleError, match="got 12 bytes, expected at most 10"):
        read_json(tmp_path / "a.json", list, BundleError)
    with pytest.raises(BundleError, match="got 12 bytes"):
        parse_json(b"[" + b" " * 10 + b"]", list, "a.json", BundleError)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    pointer = tmp_path / "tokenizer.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: only a pointer of Git LFS .* git lfs pull"):
        read_json(pointer, dict, CheckpointError)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: only a pointer of Git LFS .* git lfs pull"):
        read_tensor_file(pointer)


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "folder" / "there")
    write_atomically(link, b"old")
    write_atomically(link, b"new")
    assert link.is_symlink() and (tmp_path / "folder" / "there").read_bytes() == b"new"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InvalidInput, match="loop: cannot be written there"):
        write_atomically(loop, b"never")
    assert loop.is_symlink()
    os.mkfifo(pipe)  # as /dev/null is a device, and /dev/stdout mostly a pipe
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write_atomically(pipe, b"picture")
    assert os.read(reader, 100) == b"picture" and pipe.is_fifo()
    os.close(reader)
