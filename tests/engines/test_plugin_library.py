"""Where the plugin of a build comes from: made before, compiled now, or not to be had."""

import pytest

from engines import plugin_library
from engines.plugin_library import LIBRARY, find_or_compile, may_find

# What these tests need of CMake: told to build, it leaves a library; every call is counted.
CMAKE = f"""#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = --build ] && echo code > "$2/{LIBRARY}"
exit 0
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without the plugin, whose programs are those of a folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(plugin_library, "DEFAULT_PLUGIN", tmp_path / LIBRARY)
    monkeypatch.setattr(plugin_library, "_CUDA_FOLDER", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PATH", f"{programs}:/bin")
    monkeypatch.delenv("CUDACXX", raising=False)

    def add(name, script):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)

    return add


def find(told, tensorrt="10.13.3"):
    return find_or_compile(tensorrt, "8.7", told.append)


@pytest.mark.usefixtures("machine")
def test_what_make_plugin_built_is_taken(tmp_path):
    (tmp_path / LIBRARY).touch()
    assert may_find()
    assert find([]) == tmp_path / LIBRARY


@pytest.mark.usefixtures("machine")
def test_a_machine_without_a_compiler_is_told_what_is_missing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    told = []
    assert not may_find()
    assert find(told) is None
    assert told == [
        "building without the top-k plugin: cmake and nvcc not found. Standard operators do its work (docs/plugin.md)"
    ]


def test_the_plugin_is_compiled_once_for_each_tensorrt(machine, tmp_path):
    machine("cmake", CMAKE)
    machine("nvcc", "#!/bin/sh\n")
    told = []
    library = find(told)
    assert library.read_text() == "code\n"
    assert library.is_relative_to(tmp_path / "cache" / "hawk_trt")
    assert len(told) == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in calls[0]
    assert find(told) == library
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert find(told, tensorrt="10.16.1") != library


def test_a_compilation_that_fails_is_told_and_leaves_nothing(machine, tmp_path):
    machine("cmake", "#!/bin/sh\necho 'NvInferRuntime.h was not found' >&2\nexit 1\n")
    machine("nvcc", "#!/bin/sh\n")
    told = []
    assert find(told) is None
    assert "NvInferRuntime.h was not found" in told[-1]
    assert not (tmp_path / "cache").exists()
