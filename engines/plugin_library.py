"""The TensorRT plugin that engines are built with: built by make plugin, or compiled here once from the same sources.

A wheel holds the sources of plugins/. What is compiled from them lies in the user's cache, one folder for each version
of the sources, of TensorRT and of the GPU.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from hawk_trt.errors import InvalidInput
from hawk_trt.files import cache_folder
from hawk_trt.files.staging import write_atomically

SOURCES = Path(__file__).resolve().parent.parent / "plugins"
LIBRARY = "libhawk_trt_plugin.so"
# Where make plugin puts it; there is no such folder beside an installed package.
DEFAULT_PLUGIN = SOURCES.parent / "build" / "plugins" / LIBRARY
_CUDA_FOLDER = "/usr/local/cuda/bin"
_REASON_CHARACTERS = 300


def may_find() -> bool:
    """Whether find_or_compile may find a plugin."""
    return DEFAULT_PLUGIN.is_file() or not isinstance(_compilers(), str)


def _compilers() -> tuple[str, str] | str:
    """The programs cmake and nvcc, or which of them is missing."""
    cmake = shutil.which("cmake")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=_CUDA_FOLDER)
    if cmake and nvcc:
        return cmake, nvcc
    missing = [name for name, program in (("cmake", cmake), ("nvcc", nvcc)) if not program]
    return f"{' and '.join(missing)} not found"


def existing_plugin(path: Path) -> Path:
    """The absolute path of the file that --plugin names."""
    if not path.is_file():
        raise InvalidInput(f"--plugin: {path} is not there")
    return path.resolve()


def find_or_compile(tensorrt: str, compute_capability: str, tell: Callable[[str], None]) -> Path | None:
    """The plugin for a GPU of a compute capability as "8.7"; None where it cannot be had, and tell then says why."""
    if DEFAULT_PLUGIN.is_file():
        return DEFAULT_PLUGIN
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh", ".cpp", ".txt")):
        digest.update(path.read_bytes())
    folder = cache_folder() / f"plugin-{tensorrt}-sm{compute_capability.replace('.', '')}-{digest.hexdigest()[:12]}"
    library = folder / LIBRARY
    if not library.is_file():
        found = _compilers()
        problem = found if isinstance(found, str) else _compile(*found, library, compute_capability, tell)
        if problem:
            tell(f"building without the top-k plugin: {problem}. Standard operators do its work (docs/plugin.md)")
            return None
    return library


def _compile(cmake: str, nvcc: str, library: Path, compute_capability: str, tell: Callable[[str], None]) -> str | None:
    """Compile the library; returns why that failed, else None."""
    tell("compiling the top-k plugin, once for this machine: about a minute")
    with tempfile.TemporaryDirectory() as folder:
        architecture = f"{compute_capability.replace('.', '')}-real"
        for command in (
            [cmake, "-S", SOURCES, "-B", folder, f"-DCMAKE_CUDA_COMPILER={nvcc}",
             f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"],
            [cmake, "--build", folder, "--target", "hawk_trt_plugin"],
        ):  # fmt: skip
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
            if done.returncode:
                return " ".join(done.stderr.split())[:_REASON_CHARACTERS]
        write_atomically(library, Path(folder, LIBRARY).read_bytes())
    return None
