"""The arrows between the folders, and what may be imported where."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
FOLDERS = ("hawk_trt", "export", "engines", "plugins", "examples", "tests")
MAY_IMPORT = {"hawk_trt": set(), **{name: {"hawk_trt"} for name in ("export", "engines", "plugins", "examples")}}
IMPORT_NAMES = {"pillow": "PIL", "onnxruntime-gpu": "onnxruntime", "cuda-bindings": "cuda"}
TORCH = {"torch", "transformers"}


def imports(folder):
    """Each file of a folder with the top-level package of everything that it imports, wherever it does."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module if not node.level else folder]
            elif (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            ):
                names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            else:
                continue
            yield from ((path.relative_to(ROOT).as_posix(), name.partition(".")[0]) for name in names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_the_arrows_allow(folder):
    wrong = {(path, name) for path, name in imports(folder) if name in FOLDERS} - {
        (path, name) for path, name in imports(folder) if name == folder or name in MAY_IMPORT[folder]
    }
    assert not wrong


def test_the_walk_sees_imports_at_all():
    assert ("export/__main__.py", "hawk_trt") in set(imports("export"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_only_the_parity_reference_fastv_calibration_training_and_the_gpu_check_import_torch(folder):
    reference = {
        "hawk_trt/apps/parity/reference.py",
        "hawk_trt/apps/parity/reference_models.py",
        "hawk_trt/apps/evaluate/fastv.py",
    }
    reference |= {"hawk_trt/apps/evaluate/fastv.py", "hawk_trt/apps/calibrate/ablation.py"}
    gpu_check = {f"plugins/gpu_{name}.py" for name in ("buffers", "check", "timing")}
    training = {"__main__", "cell_heads", "checkpoint", "lessons", "network", "trainer"}
    training = {f"examples/tiny_training/{name}.py" for name in training}
    assert {path for path, name in imports(folder) if name in TORCH} <= reference | gpu_check | training


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("hawk_trt", ("cpu", "cuda", "eval", "tensorrt", "video", "parity", "ray", "lmms-eval", "serve")),
        ("export", ("export",)),
        ("engines", ("export",)),
        ("examples", ("parity",)),
    ],
)
def test_every_package_that_is_imported_is_declared(folder, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    names = (re.match(r"[\w.-]+", requirement).group().lower() for requirement in requirements)
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    declared.add("vlmeval")  # on no registry: docs/reproduce.md
    declared.add("tensorrt")  # in no extra, since JetPack brings it and pip has one a CUDA version
    allowed = declared | sys.stdlib_module_names | {folder} | MAY_IMPORT[folder]
    assert not {(path, name) for path, name in imports(folder) if name not in allowed}


@pytest.mark.parametrize(
    "module", ["hawk_trt", "hawk_trt.apps.cli.main", "hawk_trt.pipeline", "export.__main__", "examples.tiny_task"]
)
def test_importing_loads_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print(*sorted({TORCH!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
