"""mypy of all code that uses TensorRT against the real Python API of several versions: make types-tensorrt.

In: the versions of VERSIONS. Out: mypy's errors, each with its version; none means that no name or argument is used
that one of them lacks, unless guarded. NVIDIA's bindings are fetched when needed, loaded without TensorRT and without
a GPU on empty libraries, and described by pybind11-stubgen in the folder build/, which git ignores: the descriptions
hold NVIDIA's texts and are never committed.
"""

import ast
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUBS = ROOT / "build" / "tensorrt-stubs"
# JetPack 6, a 10 before the KV cache ops, JetPack 7.2, and the newest.
VERSIONS = {"10.3.0": "cu12", "10.13.3.9": "cu13", "10.16.1.11": "cu13", "11.4.0.106": "cu13"}
CHECKED = ("engines", "hawk_trt/runtime/tensorrt")
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_ENTRIES = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "initLibNvInferPlugins",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
)
_QUIET_STUBS = """
[[tool.mypy.overrides]]
module = ["tensorrt.*", "tensorrt_bindings.*"] # generated: their own errors are not ours
ignore_errors = true
"""


def main() -> int:
    """Check every version; returns 0 where none has errors, else 1."""
    failed = 0
    for version in VERSIONS:
        errors = check(make_stubs(version))
        print(f"TensorRT {version}: {f'{len(errors)} errors' if errors else 'ok'}", flush=True)
        for error in errors:
            print(f"  {error}")
        failed += bool(errors)
    return 1 if failed else 0


def make_stubs(version: str) -> Path:
    """The folder with a version's type stubs, made where it is not there."""
    folder = STUBS / version
    if folder.is_dir():
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("types-tensorrt: no C compiler was found. apt install gcc")
    STUBS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STUBS) as temporary:
        site = Path(temporary)
        wheel = f"tensorrt-{VERSIONS[version]}-bindings=={version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(site), wheel], check=True, stderr=subprocess.PIPE)
        with zipfile.ZipFile(next(site.glob("*.whl"))) as archive:
            archive.extractall(site)
        source = site / "empty.c"
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in _ENTRIES), encoding="utf-8")
        for stem in _LIBRARIES:
            name = f"lib{stem}.so.{version.split('.')[0]}"
            command = [compiler, "-shared", "-fPIC", "-o", str(site / name), str(source), f"-Wl,-soname,{name}"]
            subprocess.run(command, check=True)
        env = {**os.environ, "LD_LIBRARY_PATH": str(site), "PYTHONPATH": str(site)}
        out = site / "stubs"
        generate = [
            sys.executable,
            "-m",
            "pybind11_stubgen",
            "tensorrt_bindings",
            "--ignore-all-errors",
            "-o",
            str(out),
        ]
        done = subprocess.run(generate, env=env, capture_output=True, text=True, check=False)
        stub = out / "tensorrt_bindings" / "tensorrt.pyi"
        if not stub.is_file():
            raise SystemExit(f"types-tensorrt: pybind11-stubgen failed for {version}: {done.stderr[-500:]}")
        stub.write_text(legal(stub.read_text(encoding="utf-8")), encoding="utf-8")
        (out / "tensorrt").mkdir()
        (out / "tensorrt" / "__init__.pyi").write_text(
            "from tensorrt_bindings.tensorrt import *\n__version__: str\n", encoding="utf-8"
        )
        out.rename(folder)
    return folder


def legal(stub: str) -> str:
    """A stub that parses: pybind11 writes signatures that are not Python."""
    names = "|".join(keyword.kwlist)
    stub = re.sub(rf"(?<=[(,] )({names})(?=: )|(?<=\()({names})(?=: )", lambda found: f"{found.group()}_", stub)
    # the module has aliases named bool and the like, which hide the builtin
    stub = re.sub(r"(?m)(?<![\w.'\"])bool(?![\w'\"])(?!: )", "builtins.bool", stub)
    stub = stub.replace("import typing\n", "import builtins\nimport typing\n", 1)
    lines = stub.split("\n")
    while (number := _illegal_line(lines)) is not None:
        signature = re.match(r"( *def \w+)\(.*\)( ->.*)?$", lines[number])
        if signature is None:
            raise SystemExit(f"types-tensorrt: line {number + 1} of the stub cannot be mended: {lines[number]}")
        lines[number] = f"{signature.group(1)}(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:"
    return "\n".join(lines)


def _illegal_line(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


def check(stubs: Path) -> list[str]:
    """mypy's errors in our code over a version's stubs."""
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "pyproject.toml"
        config.write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8") + _QUIET_STUBS, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file", str(config)]
        env = {**os.environ, "MYPYPATH": str(stubs)}
        done = subprocess.run([*command, *CHECKED], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"types-tensorrt: mypy failed: {done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if ": error:" in line and line.startswith(CHECKED)]


if __name__ == "__main__":
    sys.exit(main())
