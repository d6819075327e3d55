"""The chat in the terminal, from piped lines, and the demo."""

import io
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hawk_trt.apps.cli.chat import paths_in
from hawk_trt.apps.cli.main import main
from hawk_trt.bundle import manifest_bytes, read_manifest

ROOT = Path(__file__).parents[3]
IN_A_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from hawk_trt.apps.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def samples(tiny_checkpoint):
    return tiny_checkpoint / "samples"


@pytest.fixture
def say(tiny_bundle, monkeypatch, capsys):
    """Chat with the tiny model by piped lines; exit code, answers and notes."""

    def chat(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", str(tiny_bundle), *map(str, options)])
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err

    return chat


def test_images_come_by_command_by_path_and_by_option(say, samples, tmp_path):
    spaced = tmp_path / "where is it.png"
    spaced.symlink_to(samples / "1-where.png")
    code, answers, notes = say(
        "What colour is the heart?",
        "/clear",
        f"/image {spaced}",
        "In which corner is the circle?",
        "/clear",
        f"'{samples / '2-count.png'}' Count the circles.",
        options=["--image", samples / "0-colour.png"],
    )
    assert (code, answers) == (0, ["cyan", "top left", "5"])
    assert notes.count("13 of 64 visual tokens") == 3


def test_earlier_images_stay_in_the_conversation_until_it_is_cleared(say, samples):
    first, second = samples / "0-colour.png", samples / "1-where.png"
    _, _, notes = say(f"{first} What colour is the heart?", f"{second} And here?", "/clear", f"{second} And here?")
    counts = [line.split(" visual")[0] for line in notes.splitlines() if "visual tokens," in line]
    assert counts == ["[13 of 64", "[26 of 128", "[13 of 64"]


def test_the_keep_ratio_changes_and_its_picture_is_drawn(say, samples, tmp_path):
    picture = tmp_path / "kept.png"
    asked = f"{samples / '0-colour.png'} What colour is the heart?"
    code, _, notes = say(f"/kept {picture}", "/keep 10%", asked, f"/kept {picture}", "/quit", "never asked")
    assert "no answer about an image yet" in notes and "7 of 64 visual tokens" in notes
    assert code == 1  # the first line failed, the others went on
    with Image.open(picture) as drawn:
        assert drawn.width > 400


def test_mistakes_are_told_and_the_conversation_goes_on(say, samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    code, answers, notes = say(
        *(
            "/keep all",
            "/kep 0.2",
            "/image",
            "/image nothing.png",
            "/tmp/nothing.png what?",
            f"{broken} what?",
            "/help",
        ),
        f"{samples / '0-colour.png'} What colour is the heart?",
    )
    errors = [line for line in notes.splitlines() if line.startswith("error: ")]
    expected = ("such as 0.2", "Did you mean", "expected a path", "no such file", "no such file", "not an image")
    assert all(part in error for part, error in zip(expected, errors, strict=True))
    assert "/kept [FILE]" in notes
    assert (code, answers) == (1, ["cyan"])


def test_an_interrupt_ends_the_answer_and_not_the_chat(say, samples, monkeypatch):
    written = []

    class Terminal(io.StringIO):
        def write(self, text):
            written.append(text)
            if len(written) == 1:
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    colour = f"{samples / '0-colour.png'} What colour is the heart?"
    code, _, notes = say(colour, "/clear", colour)
    assert code == 0 and "stopped" in notes
    assert "".join(written).strip().endswith("cyan")


def test_a_mark_after_a_path_belongs_to_the_sentence(tmp_path):
    (tmp_path / "a.png").touch()
    assert paths_in(f"What is {tmp_path}/a.png? It isn't 1.png") == ("What is ? It isn't 1.png", [f"{tmp_path}/a.png"])


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{escaped}", "file://{quoted}"])
def test_a_path_is_found_as_terminals_paste_it(written, tmp_path):
    path = tmp_path / "my photo.png"
    path.touch()
    words = written.format(path, escaped=str(path).replace(" ", r"\ "), quoted=str(path).replace(" ", "%20"))
    assert paths_in(f"What's in {words} and where?") == ("What's in and where?", [str(path)])


def test_demo_answers_draws_and_says_what_is_next(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[-4] for line in out.splitlines()[1:]] == ["cyan", "left", "5"]
    assert "13 of 64" in out and "hawk-trt chat Qwen/" in err
    assert Path("hawk-trt-demo.png").is_file()
    assert (
        main(["run", "tiny", "-i", str(tiny_checkpoint / "samples" / "2-count.png"), "-p", "Count the circles."]) == 0
    )
    out, err = capsys.readouterr()
    assert out == "5\n" and "Exporting" not in err  # the demo has exported it


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat(tiny_bundle, tmp_path):
    for file in tiny_bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = read_manifest(tiny_bundle)
    endless = replace(manifest, special_tokens=replace(manifest.special_tokens, eos=()))  # fills the context
    (tmp_path / "bundle.json").unlink()
    (tmp_path / "bundle.json").write_bytes(manifest_bytes(endless))
    command = [sys.executable, "-c", IN_A_TERMINAL, "chat", str(tmp_path), "--max-new-tokens", "4000"]
    ours, theirs = os.openpty()
    chat = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
        env=os.environ | {"TERM": "dumb", "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    os.close(theirs)
    shown = ""

    def until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 120)[0], f"waited for {text!r}: {shown[-200:]!r}"
            try:
                shown += os.read(ours, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {text!r}: {shown!r}") from None
        shown = shown.partition(text)[2]

    try:
        until("> ")
        os.write(ours, b"Why?\n")
        until("Why?")
        until("0")
        os.write(ours, b"\x03")  # which the terminal turns into SIGINT
        until("stopped")
        until("> ")
        os.write(ours, b"/quit\n")
        assert chat.wait(120) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)
