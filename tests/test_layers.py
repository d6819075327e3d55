"""The house: its size, the arrows between its parts, no circles, and what may be imported where."""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
FOLDERS = ("hawk_trt", "export", "engines", "plugins", "examples", "tests")
MAY_IMPORT = {
    "hawk_trt": set(),
    **{name: {"hawk_trt"} for name in ("export", "engines", "plugins")},
    "examples": {"hawk_trt", "export"},
}
IMPORT_NAMES = {"pillow": "PIL", "onnxruntime-gpu": "onnxruntime", "pyyaml": "yaml", "cuda-bindings": "cuda"}
TORCH = {"torch", "transformers"}


SOURCES = ("hawk_trt", "export", "engines", "plugins")
MOST_ENTRIES, MOST_LINES = 14, 400
# Commands that live with what they do, and belong to the command line.
COMMANDS = {"export.__main__", "engines.__main__", "engines.checks.preflight", "engines.checks.self_test"}
COMMANDS |= {"hawk_trt.apps.serve.ray_app", "hawk_trt.apps.serve.ray_options"}  # of Ray's own command, serve run


def modules():
    """Each module of the sources by name, with its file."""
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def graph():
    """The modules that each module imports, wherever it does: inside a function and for type checking too."""
    files = dict(modules())
    found = {name: set() for name in files}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                base = ".".join(filter(None, (above, node.module)))
                targets = [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # import_module("...") and the like
                targets = [node.value]
            else:
                continue
            for target in targets:
                # installed, export/ and its neighbours are parts of hawk_trt
                target = re.sub(r"^hawk_trt\.(export|engines|plugins)\b", r"\1", target)
                target = target if target in files else target.rpartition(".")[0]
                if target in files and target != name and "." in target:
                    found[name].add(target)
    return found


def part(module):
    """Which part of the house a module is of: core, the name of a folder, or that of an app."""
    if module in COMMANDS:
        return "cli"
    top, *rest = module.split(".")
    if top != "hawk_trt":
        return top
    return "cli" if rest == ["__main__"] else rest[1] if rest[:1] == ["apps"] and len(rest) > 1 else "core"


def test_the_core_can_be_seen_at_a_glance():
    entries = {path.name for path in (ROOT / "hawk_trt").iterdir()}
    entries -= {"__init__.py", "__main__.py", "__pycache__", "py.typed", "data"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_no_file_is_too_long_to_read_at_once():
    kinds = {".py", ".cu", ".cuh", ".cpp", ".h", ".js", ".html", ".css"}
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_arrows_point_to_the_core_and_only_the_command_line_knows_the_apps():
    arrows = {(one, other) for one, others in graph().items() for other in others}
    wrong = {(one, other) for one, other in arrows if part(other) not in ("core", part(one)) and part(one) != "cli"}
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(graph()).prepare()  # it says which circle there is


@cache
def imports(folder):
    """Each file of a folder with the top-level package of everything that it imports, wherever it does."""
    found = set()
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
            found |= {(path.relative_to(ROOT).as_posix(), name.partition(".")[0]) for name in names}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_the_arrows_allow(folder):
    wrong = {(path, name) for path, name in imports(folder) if name in FOLDERS} - {
        (path, name) for path, name in imports(folder) if name == folder or name in MAY_IMPORT[folder]
    }
    assert not wrong


def test_the_walk_sees_imports_at_all():
    assert ("export/__main__.py", "hawk_trt") in imports("export")
    found = graph()
    assert "hawk_trt.request" in found["hawk_trt.pipeline"]  # at its top
    assert "hawk_trt.models.internvl" in found["hawk_trt.models"]  # inside a function
    assert "hawk_trt.pipeline" in found["hawk_trt.apps.explain.picture"]  # for type checking alone
    assert any(part(other) == "engines" for other in found["engines.writer"])  # relative


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_only_the_parity_reference_fastv_calibration_and_training_import_torch(folder):
    reference = {
        "hawk_trt/apps/parity/reference.py",
        "hawk_trt/apps/parity/reference_models.py",
        "hawk_trt/apps/evaluate/fastv.py",
    }
    reference |= {"hawk_trt/apps/evaluate/fastv.py", "hawk_trt/apps/evaluate/calibration_worker.py"}
    training = {"__main__", "cell_heads", "checkpoint", "evidence", "hybrid", "lessons", "network", "trainer"}
    training = {f"examples/tiny_training/{name}.py" for name in training}
    assert {path for path, name in imports(folder) if name in TORCH} <= reference | training


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
    declared.add("vlmeval")  # in no extra, since its packages pin others: docs/reproduce.md
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
