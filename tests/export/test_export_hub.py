"""Exporting a hub id where there is no network: from the hub's cache, or with an error that says what to do."""

import shutil
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from export.__main__ import main
from hawk_trt.bundle import Bundle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model")


def test_a_hub_id_that_is_not_in_the_cache_says_what_to_do_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["owner/name", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "owner/name: no such folder, and the hub cannot be reached" in error
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize("link", [False, True])
def test_a_hub_id_is_read_from_the_cache_when_there_is_no_network(tmp_path, checkpoint, monkeypatch, link):
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064d}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064d}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["owner/name", "--out", str(tmp_path / "out"), *(["--link"] if link else [])]) == 0
    made = Bundle.load(tmp_path / "out", verify=True)
    assert made.manifest.source.name == "owner/name"
    assert not any(path.is_symlink() for path in made.folder.iterdir())
    assert (made.manifest.files.get("model.safetensors") is not None) == link
