"""Wheels for a machine without a network, in parts that can be carried one by one. Standard library only.

pack    wheels from the package index -> parts of one archive, and parts.json with the hash of each
unpack  parts -> the wheels whose package is missing here, installed into a folder for PYTHONPATH
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

# What a machine with PyTorch for CUDA, transformers, onnx and cuda-bindings lacks.
REQUIREMENTS = (
    *("onnxruntime-gpu==1.31.1", "msgspec==0.22.0", "xxhash==4.1.0"),
    *("cyclopts==5.5.2", "docstring_parser==0.18.0"),
)
_INDEX = "parts.json"
# pip takes a wheel for one of these alone, not for all older ones.
_PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)))


def pack(folder: Path, requirements: tuple[str, ...], python: str, part_mb: int) -> int:
    """Fetch wheels for x86-64 Linux and write them as parts; returns an exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch]
        command += ["--implementation", "cp", "--python-version", python]
        command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
        if subprocess.run([*command, *requirements], check=False).returncode != 0:
            print("error: pip could not fetch all of them; its reason is above", file=sys.stderr)
            return 1
        parts = write_parts(sorted(Path(scratch).glob("*.whl")), folder, part_mb * 1_000_000)
    for part in parts:
        print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")
    print(f"carry {folder / _INDEX} and each part, then: python -m benchmarks.gpu_report --unpack {folder}")
    return 0


def write_parts(files: list[Path], folder: Path, part_bytes: int) -> list[Path]:
    """Files as parts of one archive, in place of the parts that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*"):
        old.unlink()
    hashes: dict[str, str] = {}
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for file in files:
                archive.add(file, file.name)
        whole.seek(0)
        while content := whole.read(part_bytes):
            part = folder / f"part-{len(hashes):02d}"
            part.write_bytes(content)
            hashes[part.name] = hashlib.sha256(content).hexdigest()
    (folder / _INDEX).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    return [folder / name for name in hashes]


def read_parts(folder: Path, target: Path) -> list[Path]:
    """The files that parts were made of, written into a folder."""
    hashes: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    with tempfile.TemporaryFile() as whole:
        for name, expected in hashes.items():
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                raise ValueError(f"{folder / name}: {'damaged' if content else 'missing'}; carry it again")
            whole.write(content)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as archive:
            archive.extractall(target, filter="data")
    return sorted(target.iterdir())


def unpack(folder: Path, site: Path) -> int:
    """Install the wheels whose package is not there yet into a folder; returns an exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = read_parts(folder, Path(scratch))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        missing = [wheel for wheel in found if not _installed(wheel.name.partition("-")[0])]
        if missing:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            status = subprocess.run([*command, "--target", site, *missing], check=False).returncode
            if status != 0:
                return 1
    print(f"installed {len(missing)} of {len(found)} wheels. Run with PYTHONPATH={site}")
    return 0


def _installed(package: str) -> bool:
    try:
        metadata.version(re.sub("_", "-", package))
    except metadata.PackageNotFoundError:
        return False
    return True
