"""The wheel: what it holds, and that it works in an empty environment, away from the checkout."""

import base64
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from examples.tiny_task import generate

ROOT = Path(__file__).parent.parent
INSIDE = ("export", "engines", "plugins")
TINY = "hawk_trt/data/tiny_vlm"
COLOUR = "What colour is the heart?"


def run(*command, **settings):
    """Run a command; its stdout, once it has ended well."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, since a build leaves files in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    junk = shutil.ignore_patterns("__pycache__")
    for name in ("hawk_trt", *INSIDE, "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def files(folder, inside):
    """The files of a folder of the checkout, under the name that the wheel gives it."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths}


def test_the_wheel_holds_the_four_folders_and_the_tiny_model_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt")))
    expected = files("hawk_trt", "hawk_trt") | files("examples/tiny-vlm", TINY)
    expected |= files("examples/tiny_task", "hawk_trt/data/tiny_task")
    for folder in INSIDE:
        expected |= files(folder, f"hawk_trt/{folder}")
    assert held == expected
    assert {f"hawk_trt/plugins/{name}" for name in ("CMakeLists.txt", "weighted_topk_kernel.cu")} <= held
    assert b"hawk-trt = hawk_trt.apps.cli.main:main" in entry_points


def served_answer(hawk_trt, image, away):
    """What OpenAI's client gets from `hawk-trt serve` of the model that comes along."""
    openai = pytest.importorskip("openai")
    command = [hawk_trt, "serve", "tiny", "--port", "0", "--api-key", "secret", "--served-model-name", "mine"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **away)
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("serving"))
        next(line for line in server.stderr if "ready:" in line)
        address = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": COLOUR}]
        with openai.OpenAI(base_url=url, api_key="secret") as client:
            asked = {"model": "mine", "messages": [{"role": "user", "content": content}], "temperature": 0}
            return client.chat.completions.create(**asked).choices[0].message.content
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


@pytest.mark.wheel
def test_the_wheel_exports_runs_serves_and_examines_away_from_the_checkout(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python, hawk_trt = environment / "bin" / "python", environment / "bin" / "hawk-trt"
    away = {"cwd": tmp_path, "env": {"PATH": os.defpath, "HOME": str(tmp_path)}}
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[all]", cwd=tmp_path)
    where = run(python, "-c", "import hawk_trt; print(hawk_trt.__path__[0])", **away).strip()
    assert where.startswith(str(environment))
    tiny = Path(where) / "data" / "tiny_vlm"
    run(hawk_trt, "export", tiny, "--out", "bundle", **away)
    image = tiny / "samples" / "0-colour.png"
    answer = json.loads(run(hawk_trt, "run", "bundle", "--image", image, "--prompt", COLOUR, "--json", **away))
    assert (answer["text"], answer["num_kept"]) == ("cyan", 13)
    code = (
        "from hawk_trt.apps.evaluate import datasets; print(*next(iter(datasets.load_dataset('tiny', 1, 3))).answers)"
    )
    assert run(python, "-c", code, **away).strip() == next(generate(3, 1)).answer, "the task comes with the wheel"
    assert "cyan" in run(hawk_trt, "demo", **away) and (tmp_path / "hawk-trt-demo.png").is_file()
    assert run(hawk_trt, "chat", "tiny", input=f"{image} {COLOUR}\n", **away) == "cyan\n"
    assert served_answer(hawk_trt, image, away) == "cyan"
    found = json.loads(run(hawk_trt, "doctor", "bundle", "--json", **away))
    assert found["bundle"]["problem"] is None
    assert {"run on CPU", "export", "serve", "video", "eval"} <= {
        item["name"] for item in found["capabilities"] if item["works"]
    }
    assert not list(tmp_path.glob("build"))
    refused = subprocess.run([hawk_trt, "build", "bundle", "--out", "engines"], capture_output=True, text=True, **away)
    assert refused.returncode == 1
    assert "tensorrt: not installed" in refused.stderr.splitlines()[-1]
