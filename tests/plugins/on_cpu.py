"""The plugin's kernel file compiled for this machine's processor: the same source, its threads as fibers.

In: a cache folder. Out: a library with the entries of libhawk_topk.so, which takes addresses of host memory. What the
emulation covers, and what not, is said at the top of cuda_on_cpu/cuda_runtime.h.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from hawk_trt.errors import BackendError

FOLDER = Path(__file__).parent.parent.parent / "plugins"
SOURCES = ("weighted_topk_kernel.cu", "weighted_topk_c.cpp")
EMULATION = Path(__file__).parent / "cuda_on_cpu"
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-shared",
    "-fPIC",
    "-U_FORTIFY_SOURCE",  # it takes fibers for smashed stacks
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
)


def compile_for_cpu(cache: Path, sources: Path = FOLDER, compiler: str = "g++", options: tuple[str, ...] = ()) -> Path:
    """Compile the kernel, or take it from the cache where nothing changed.

    Args:
        cache: folder to keep libraries in, named by the hash of what went in.
        sources: folder of the kernel's files.
        compiler: a C++17 compiler that takes g++'s flags.
        options: more flags.

    Returns:
        The library.

    Raises:
        BackendError: there is no compiler, or it refuses the source.
    """
    program = shutil.which(compiler)
    if program is None:
        raise BackendError(f"{compiler}: not found; the kernel's checks need it. Install it: apt install g++")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join((version, *_FLAGS, *options)).encode())
    for file in sorted([*sources.glob("*.cu"), *sources.glob("*.cuh"), *sources.glob("*.cpp"), *EMULATION.iterdir()]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    library = cache / f"libhawk_topk_cpu-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        output = Path(scratch) / library.name
        files = ["-x", "c++", *(str(sources / name) for name in SOURCES)]
        command = [program, *_FLAGS, *options, "-I", str(EMULATION), *files, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BackendError(f"{compiler} refused the kernel:\n{done.stderr}")
        output.replace(library)
    return library
