"""The command python -m tests.plugins.plugin_check: the plugin against TensorRT's headers and registries; no GPU.

In: one or more folders with TensorRT's headers. For each: the plugin is built, warnings being errors; its contract
is checked through getCreators() with no TensorRT library loaded; then it is loaded, created from and deregistered in
the plugin registry of each lean runtime of the same major version. These runtimes are NVIDIA's wheels, fetched
when first needed and kept under build/.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hawk_trt.errors import BackendError, HawkError

FOLDER = Path(__file__).parent
# The oldest wheel that holds its libraries, JetPack 7.2's version, and the first and newest of 11.
LEAN_RUNTIMES = ("10.15.1.29", "10.16.1.11", "11.0.0.114", "11.4.0.106")
_LEAN_PACKAGE = "tensorrt-lean-cu13-libs"
_PLUGIN = "libhawk_trt_plugin.so"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 all held, 1 something did not, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        for root in args.tensorrt_root:
            _check(root, args.build, args.architectures, registry=args.registry)
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.plugin_check",
        description="Build the plugin and check its contract and its loading in TensorRT's registry; needs no GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "tensorrt_root", type=Path, nargs="+", metavar="TENSORRT_ROOT", help="folder with include/NvInferRuntime.h"
    )
    parser.add_argument("--build", type=Path, default=Path("build/plugin-check"), help="folder for what is built")
    parser.add_argument(
        "--architectures", default="87-real;90-real", help="CUDA architectures to compile the kernel for"
    )
    parser.add_argument(
        "--no-registry", dest="registry", action="store_false", help="leave out the lean runtimes: no network needed"
    )
    return parser


def _check(root: Path, build: Path, architectures: str, *, registry: bool) -> None:
    version = header_version(root)
    folder = build / version
    print(f"TensorRT {version} headers: {root}", flush=True)
    options = (f"-DTENSORRT_ROOT={root.resolve()}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    _run(["cmake", "-S", str(FOLDER), "-B", str(folder), *options])
    _run(["cmake", "--build", str(folder)])
    print("  built without a warning", flush=True)
    _report("contract, no TensorRT library loaded", [folder / "hawk_plugin_contract", folder / _PLUGIN])
    if not registry:
        return
    for runtime in LEAN_RUNTIMES:
        if runtime.split(".")[0] == version.split(".")[0]:
            library = lean_runtime(runtime, build / "lean")
            _report(f"registry of {runtime}", [folder / "hawk_plugin_contract", folder / _PLUGIN, library])


def header_version(root: Path) -> str:
    """MAJOR.MINOR.PATCH that a folder's headers say.

    Raises:
        BackendError: there are no TensorRT headers.
    """
    file = root / "include" / "NvInferVersion.h"
    if not file.is_file():
        raise BackendError(f"{root}: no include/NvInferVersion.h. Give a folder with TensorRT's headers: TENSORRT_ROOT")
    text = file.read_text(encoding="utf-8")
    # older headers define the numbers at once, newer ones by way of an _ENTERPRISE name
    numbers = [
        re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    if not all(numbers):
        raise BackendError(f"{file}: holds no version")
    return ".".join(number[1] for number in numbers if number)


def lean_runtime(version: str, cache: Path) -> Path:
    """The library of a lean runtime, fetched from the package index where the cache lacks it.

    Raises:
        BackendError: the wheel cannot be had.
    """
    folder = cache / version
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            _run([*command, "--dest", scratch, f"{_LEAN_PACKAGE}=={version}"])
            for wheel in Path(scratch).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(Path(scratch) / "wheel")
            (Path(scratch) / "wheel").replace(folder)
    libraries = sorted(folder.rglob("libnvinfer_lean.so.*"))
    if not libraries:
        raise BackendError(f"{folder}: holds no libnvinfer_lean.so. Remove the folder and run again")
    return libraries[0]


def _run(command: list[str]) -> None:
    """Run quietly; what was printed is shown where the command fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise BackendError(f"{command[0]}: not found; plugin-check needs cmake, g++ and nvcc") from None
    if done.returncode != 0:
        raise BackendError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}")


def _report(what: str, command: list[Path]) -> None:
    """Run the contract program and print how much held, or what did not."""
    # a runtime may look for its resource beside itself only
    environment = {**os.environ, "LD_LIBRARY_PATH": str(command[-1].parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    failed = done.returncode != 0
    if failed:
        raise BackendError(f"{what}: failed with status {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"  {what}: {len(re.findall('^  ok', done.stdout, re.MULTILINE))} statements hold", flush=True)


if __name__ == "__main__":
    sys.exit(main())
