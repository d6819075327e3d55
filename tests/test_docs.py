"""The documents: every link leads somewhere, every command and example in them runs."""

import ast
import base64
import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hawk_trt
from engines.__main__ import main as engines
from engines.checks.preflight import main as preflight
from engines.checks.self_test import main as self_test
from examples.tiny_task.__main__ import main as tiny_task
from export.__main__ import main as export
from hawk_trt.apps.cli.main import main as hawk

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("containers/**/*.md"),
        *ROOT.glob("tests/**/*.md"),
        *ROOT.glob("docs/**/*.md"),
    )
)
MADE_WITH_THE_SITE = {"cli.md", "notebook.md"}  # by docs/hooks.py
COMMANDS = {
    "hawk-trt": hawk,
    "python -m export": export,
    "python -m engines": engines,
    "python -m engines.checks.preflight": preflight,
    "python -m engines.checks.self_test": self_test,
    "python -m examples.tiny_task": tiny_task,
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(path, language=""):
    """The fenced blocks of a document."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for found, block in fenced if found == language]


def code_lines(path):
    """The lines of a document's blocks without a language, and its code within sentences."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks(path) for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)


def command_lines():
    """Every command of ours in a block or in code within a sentence, without its comment."""
    for path in DOCUMENTS:
        for line in code_lines(path):
            for program in COMMANDS:
                if line.startswith(program + " "):
                    yield pytest.param(
                        program, shlex.split(line[len(program) :], comments=True), id=f"{path.name}: {line[:60]}"
                    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_that_exist(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    inside = {link for link in links if "://" not in link} - MADE_WITH_THE_SITE
    assert not [link for link in inside if not (path.parent / link).exists()]


@functools.cache
def options_of(program, subcommand):
    """The options that the help of a command shows."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match="0"):
        COMMANDS[program]([*subcommand, "--help"])
    return set(re.findall(r"--[a-z-]+", printed.getvalue()))


@pytest.mark.parametrize(("program", "words"), list(command_lines()))
def test_commands_in_the_documents_have_the_options_that_they_use(program, words):
    subcommand = words[:1] if program == "hawk-trt" and not words[0].startswith("-") else []
    known = options_of(program, tuple(subcommand))
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}


def test_make_targets_and_variables_in_the_documents_exist():
    code = "\n".join(line for path in DOCUMENTS for line in code_lines(path))
    targets = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"demo", "check", "export"} <= targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = {name for line in re.findall(r"\bmake [a-z-]+(.*)", code) for name in re.findall(r"([A-Z_]+)=", line)}
    assert {"MODEL", "OUT"} <= variables <= set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))


def test_phony_targets_are_those_that_help_or_check_name():
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)).split())
    assert phony == set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_the_tree_names_what_exists():
    (tree,) = (block for block in blocks(ROOT / "CONTRIBUTING.md") if block.startswith("export/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT / name
        assert (folder / name if line.startswith(" ") else folder).exists(), line


def test_the_python_example_in_the_readme_runs(tiny_bundle, tmp_path):
    (code,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "tiny-vlm").symlink_to(tiny_bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["cyan from 13 of 64 visual tokens", "5"], done.stderr


def test_the_notebook_prints_what_is_stored_in_it(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "tiny-vlm").symlink_to(tiny_bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        code = ast.parse("".join(cell["source"]))
        shown = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "cell", "exec"), names)
            value = eval(compile(ast.Expression(shown.value), "cell", "eval"), names) if shown else None
        stored = {"stream": "", "execute_result": None}
        for output in cell["outputs"]:
            stored[output["output_type"]] = output.get("text") or output["data"]
        assert printed.getvalue() == "".join(stored["stream"])
        if stored["execute_result"] is None:
            assert value is None
        elif "text/plain" in stored["execute_result"]:
            assert repr(value) == "".join(stored["execute_result"]["text/plain"])
        else:  # a picture: equal but for JPEG's losses
            jpeg = base64.b64decode("".join(stored["execute_result"]["image/jpeg"]))
            difference = np.asarray(value.convert("RGB"), float) - np.asarray(Image.open(io.BytesIO(jpeg)), float)
            assert np.sqrt(np.mean(difference**2)) < 12


def test_make_takes_paths_with_spaces():
    command = ["make", "-n", "--no-print-directory", "demo"]
    command += ["IMAGE=my photos/a b.png", "MODEL=my models/tiny vlm", "VENV=.venv"]
    # `make tests` runs this test, and a make inside a make inherits options and variables.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    printed = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    (asked,) = (shlex.split(line) for line in printed.splitlines() if line.startswith(".venv/bin/hawk-trt run "))
    assert asked[3:5] == ["--image", "my photos/a b.png"]
    assert "artifacts/tiny vlm" in asked


def test_the_version_is_the_same_everywhere():
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.findall(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert hawk_trt.__version__ == project.group(1) == changes[0]
