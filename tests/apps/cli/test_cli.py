"""The command line: what all commands have in common, and doctor."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import ROOT, start
from hawk_trt.apps.cli.main import COMMANDS, main


def usage_error(argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratio", "0"], "keep_ratio: got 0.0, expected a number in (0, 1]"),
        (["--keep-ratio", "nan"], "keep_ratio"),
        (["--keep-ratio", "2"], "keep_ratio"),
        (["--min-visual-tokens", "0"], "min_visual_tokens"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--seed", "-1"], "seed"),
        (["--head-weights", "no-such-file.json"], "no-such-file.json"),
        (["--image", "no-such-image.png"], "no-such-image.png"),
        (["--video", "no-such-clip.mp4"], "no-such-clip.mp4"),
        (["--prompt", "  "], "--prompt"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--min-pixels", "100000000"], "min_pixels"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_a_command_to_try_and_exit_code_1(ask, options, message, capsys):
    assert main([*ask, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    told, tried = err.splitlines()
    assert told.startswith("error: ") and message in told
    assert tried.startswith("  try: hawk-trt run ")


def test_closed_streams_hold_nothing_up_and_get_nothing(ask, sample, monkeypatch, capsys):
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stderr", None)  # as `2>&-` leaves it
        assert main(ask) == 0
        sys.stderr.close()
    assert capsys.readouterr().out == f"{sample[2]}\n"
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert main(ask) == 0
        sys.stdout.close()
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdin", None)
        assert main([*ask[:-1], "-"]) == 1
        sys.stdin.close()
    assert "--prompt: got an empty text" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["0", "2"])
def test_the_help_ends_where_a_terminal_has_no_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("serve:\n  port: 99999\n", "port: got 99999"),
        ("\ufeffport: 99999\n", "port: got 99999"),
        ("port: !!python/object/apply:os.getcwd []\n", "--config"),
        ("port: [\n", "--config"),
        ("- port\n", "--config"),
    ],
)
def test_a_file_of_options_is_read_or_refused_as_a_whole(tiny_bundle, tmp_path, capsys, content, message):
    file = tmp_path / "options.yaml"
    file.write_text(content, encoding="utf-8")
    assert main(["serve", str(tiny_bundle), "--config", str(file)]) == 1
    assert message in capsys.readouterr().err.splitlines()[0]


def test_a_folder_whose_name_is_not_utf8_is_told_so(tiny_bundle, tmp_path, capsys):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    folder.symlink_to(tiny_bundle)
    assert main(["run", str(folder), "--prompt", "hi"]) == 1
    assert "no path that is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[", "{}", '["a"]', "[NaN]", "[-1.0]", "[0, 0]", "[1, 2]", "\udcff"])
def test_head_weights_that_cannot_be_used_are_refused(ask, content, tmp_path, capsys):
    file = tmp_path / "weights.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert main([*ask, "--head-weights", str(file)]) == 1
    assert "head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["run", "bundle"],
        ["run", "bundle", "--prompt", "?", "--keep-ratio", "much"],
        ["run", "bundle", "--prompt", "?", "--quota", "none"],
        ["run", "bundle", "--prompt", "?", "--max-new", "3"],
        ["explain", "bundle", "--prompt", "?", "--keep-ratios", "0.1;0.2"],
        ["doctor", "a", "b"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    assert (usage_error(argv) if argv else main(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: hawk-trt COMMAND" in err if not argv else err.startswith("error: ")
    assert not argv or err.count("\n") <= 2  # what is wrong, and a command that works
    assert not argv or f"See: hawk-trt {argv[0]} --help" in err or "See: hawk-trt --help" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert usage_error([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Usage: hawk-trt {command}" in told
    assert f"Example: hawk-trt {command} " in told


def test_help_loads_no_runtime_and_nothing_loads_torch(ask):
    code = (
        "import sys\nfrom hawk_trt.apps.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(*sorted({'onnxruntime', 'torch', 'transformers', 'av'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = start("run", "--help", code=code)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    done = start(*ask, code=code)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "onnxruntime")


def test_a_traceback_is_shown_on_request_only(tmp_path):
    argv = ("run", tmp_path, "--prompt", "?")
    quiet, loud = start(*argv), start(*argv, env={"HAWK_DEBUG": "1"})
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith(quiet.stderr)


def test_an_interrupt_is_exit_code_130():
    code = (
        "import sys, hawk_trt.apps.cli.doctor as doctor\n"
        "def interrupted(): raise KeyboardInterrupt\n"
        "doctor.doctor = interrupted\n"
        "from hawk_trt.apps.cli.main import main; sys.exit(main(['doctor']))\n"
    )
    done = start(code=code)
    assert (done.returncode, done.stderr.strip()) == (130, "")


def test_a_reader_that_leaves_early_causes_no_noise():
    command = f"{sys.executable} -m hawk_trt doctor --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_an_answer_beyond_the_terminals_encoding_is_still_printed():
    code = (
        "import sys, hawk_trt.apps.cli.doctor as doctor\n"
        "doctor.doctor = lambda: print('caf\\u00e9 \\u732b') or 0\n"
        "from hawk_trt.apps.cli.main import main; sys.exit(main(['doctor']))\n"
    )
    done = start(code=code, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")


def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hawk_trt", "doctor"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_doctor_finds_a_bundle_whole(tiny_bundle, capsys):
    assert main(["doctor", str(tiny_bundle)]) == 0
    out, err = capsys.readouterr()
    assert "whole, every file as exported" in out
    assert "tiny-vlm" in out
    assert "verifying" in err


@pytest.mark.parametrize("weights", [True, False])
def test_doctor_and_verify_find_a_changed_byte(tiny_bundle, weights, tmp_path, capsys, ask):
    damaged = tmp_path / "bundle"
    damaged.mkdir()
    entries = json.loads((tiny_bundle / "bundle.json").read_text())["files"]
    victim = next(name for name, entry in entries.items() if entry.get("weights", False) is weights)
    for path in tiny_bundle.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    content = bytearray((damaged / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / victim).write_bytes(content)

    assert main(["doctor", str(damaged)]) == 1
    out, err = capsys.readouterr()
    assert "not usable" in out
    assert victim in err
    assert main(["doctor", str(damaged), "--json"]) == 1
    assert victim in json.loads(capsys.readouterr().out)["bundle"]["problem"]
    assert main(["run", str(damaged), *ask[2:], "--verify"]) == 1
    assert victim in capsys.readouterr().err


def test_doctor_of_no_bundle_says_how_to_make_one(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    assert "hawk-trt export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["rum", "bundle"], 'Did you mean "run"?'),
        (["run", "bundle", "--promt", "?"], "Did you mean --prompt"),
        (["run", "bundle", "--prompt", "?", "--keep-rato", "0.2"], "Did you mean --keep-ratio"),
        (["run", "bundle", "--prompt", "?", "--selector", "hawks"], '"hawk"'),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(argv, suggestion, capsys):
    assert usage_error(argv) == 2
    assert suggestion in capsys.readouterr().err


def test_flags_have_the_names_that_others_give_them(ask, capsys):
    words = ["run", "--model", ask[1], *ask[2:], "--max-tokens", "1", "--keep-ratios", "0.1", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["token_ids"]), result["keep_ratio"]) == (1, 0.1)
    assert main([*words[:-1], "--keep-ratio", "0.5", "--json"]) == 0  # the last one counts
    assert json.loads(capsys.readouterr().out)["keep_ratio"] == 0.5


def test_a_checkpoint_is_exported_once_and_then_answers(ask, sample, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for told in (True, False):
        assert main(["run", str(tiny_checkpoint), *ask[2:]]) == 0
        out, err = capsys.readouterr()
        assert out == f"{sample[2]}\n"
        assert ("Exporting it in float32" in err) is told
    (folder,) = (tmp_path / "hawk_trt" / "bundles").iterdir()
    assert (folder / "bundle.json").is_file()


def test_what_is_named_in_anothers_place_is_recognised(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    engines = tmp_path / "engines"
    engines.mkdir()
    (engines / "engines.json").write_text("{}")
    out = str(tmp_path / "out")
    for argv, command in (
        (["export", tiny_bundle, "--out", out], f"hawk-trt run {tiny_bundle} --prompt TEXT"),
        (["export", engines, "--out", out], f"hawk-trt run {engines} --prompt TEXT"),
        (["build", tiny_checkpoint, "--out", out], f"hawk-trt export {tiny_checkpoint} --out tiny-vlm-bundle"),
        (["build", "Qwen/Qwen2.5-VL-3B-Instruct", "--out", out], "hawk-trt export Qwen/Qwen2.5-VL-3B-Instruct --out"),
        (["build", engines, "--out", out], f"hawk-trt run {engines} --prompt TEXT"),
        (["run", tmp_path, "--prompt", "?"], f"hawk-trt run {engines} --prompt '?'"),
    ):
        assert main([str(word) for word in argv]) == 1
        err = capsys.readouterr().err
        assert command in err and err.count("\n") == 2
    assert not Path(out).exists()


def test_doctor_tells_the_versions_that_the_tests_pass_with(capsys):
    assert main(["doctor", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)["tested"]
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert tested == pins and {"numpy", "onnxruntime", "cyclopts"} <= set(tested)
