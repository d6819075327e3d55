"""The environment of a checkout: one line where it cannot be made, made anew where it is half made."""

import subprocess
import sys

import pytest

import environment


@pytest.fixture
def calls(monkeypatch):
    """The commands that would have been run, each done well."""
    commands = []

    class Pip:
        stdout = iter(["Collecting numpy\n", "ERROR: No matching distribution found for numpy\n"])

        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return int("broken" in commands[-1][-1])

    monkeypatch.setattr(subprocess, "check_call", lambda command: commands.append(command))
    monkeypatch.setattr(subprocess, "Popen", Pip)
    return commands


def test_a_python_that_is_too_old_says_so_before_anything_is_installed(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    assert environment.main(str(tmp_path / "venv"), str(tmp_path / "stamp"), "cpu") == 1
    assert capsys.readouterr().err == (
        "error: Python 3.8 is too old: hawk_trt needs 3.10 or newer. Try: make setup PYTHON=python3.11\n"
    )
    assert not calls and not list(tmp_path.iterdir())


def test_a_half_made_environment_is_made_anew(calls, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "venv"
    folder.mkdir()
    monkeypatch.setattr(environment, "usable", lambda _: False)
    assert environment.main(str(folder), str(tmp_path / "stamp"), "cpu,export") == 0
    assert calls[0] == [sys.executable, "-m", "venv", "--clear", str(folder)]
    assert calls[1][0] == str(folder / "bin" / "python") and calls[1][-1] == ".[cpu,export]"
    assert (tmp_path / "stamp").exists()
    told = capsys.readouterr().err.splitlines()
    assert "half made" in told[0] and len(told) == 3  # that, what is installed, and that it is ready


def test_a_whole_environment_stays(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "usable", lambda _: True)
    assert environment.main(str(tmp_path), str(tmp_path / "stamp"), "cpu") == 0
    assert len(calls) == 1


@pytest.mark.usefixtures("calls")
def test_pips_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "usable", lambda _: True)
    assert environment.main(str(tmp_path), str(tmp_path / "stamp"), "broken") == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ERROR: No matching") and str(tmp_path / "pip.log") in told[-1]
    assert not (tmp_path / "stamp").exists() and "Collecting" in (tmp_path / "pip.log").read_text()


def test_pip_is_looked_for_where_a_python_is(tmp_path):
    assert environment.usable(sys.executable) == (subprocess.call([sys.executable, "-c", "import pip"]) == 0)
    half_made = tmp_path / "python"
    half_made.write_text("half")
    assert not environment.usable(str(half_made)) and not environment.usable("/nowhere/python")
