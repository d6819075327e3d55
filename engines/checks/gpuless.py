"""NVIDIA's real ONNX parser and builder on a machine with no GPU, for checks: TensorRT-RTX under TensorRT's name.

TensorRT-RTX builds without a GPU, and its Python bindings have the names of TensorRT's. It is not TensorRT proper: a
pass is strong evidence that TensorRT from 10.15 on takes a graph, and says nothing of older ones.

The wheels are fetched when first needed and kept in the user's cache, never in the repository: NVIDIA's licence
does not let others pass them on.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from hawk_trt.errors import BackendError
from hawk_trt.files import cache_folder

RTX_VERSION = "1.7.1.116"
WHEELS = (f"tensorrt-rtx-cu13-bindings=={RTX_VERSION}", f"tensorrt-rtx-cu13-libs=={RTX_VERSION}")
# Graphs are prepared for this version of TensorRT: what it takes, this RTX takes too.
_MODULE = 'from tensorrt_rtx_bindings import *\n__version__ = "11.4.0.106"\n'


def packages() -> Path:
    """The folder that gives `import tensorrt` this builder, once it is first in sys.path; made where it is missing."""
    folder = cache_folder() / f"preflight-rtx-{RTX_VERSION}-{sys.implementation.cache_tag}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"preflight: fetching NVIDIA's wheels (about 100 MB, once) into {folder}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        site = Path(partial) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--target", str(site), *WHEELS], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
            raise BackendError(
                f"preflight: {' and '.join(WHEELS)} cannot be had ({reason}). "
                "They exist for Linux on x86-64, Python 3.10 to 3.13"
            )
        # the parser ends the process at the first plugin if it cannot open the builder by this name
        (site / "tensorrt_rtx_libs" / "libtensorrt_rtx.so").symlink_to("libtensorrt_rtx.so.1")
        (site / "tensorrt").mkdir()
        (site / "tensorrt" / "__init__.py").write_text(_MODULE, encoding="utf-8")
        try:
            site.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
