"""Time, memory and disk of an export of real size, against copying the same files.

The checkpoint has the shapes of Qwen2.5-VL-7B in bfloat16, 16.6 GB in five sparse shards, which take no disk space;
the copy and the bundle take theirs, one after the other. Run it from the repository: python -m benchmarks.export_7b
With --quantised awq or gptq it is of random int4 in groups of 128, with zero points: 6.9 GB that are written first. The
copy and the export read them from the disk, and the clock stops when the disk has everything; with --warm they read
from memory what the system keeps of them, and what is on its way to the disk does not count.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from export.architectures import read_config
from export.checkpoint import Checkpoint
from export.graphs import build_graphs
from export.weights import WeightStore
from hawk_trt.stages import TARGETS
from tests.checkpoints import (
    HUB,
    QWEN_7B,
    config,
    make_sparse_checkpoint,
    named,
    safetensors_header,
    shapes,
    write_json,
)

MAX_PEAK_RSS_GB = 4.0
MAX_QUANTISED_PEAK_RSS_GB = 1.0
MAX_TIMES_COPY = 1.5
MAX_GRAPH_SECONDS = 1.0
_FREE_GB = 18.0


@dataclass(frozen=True, slots=True)
class Run:
    """One command: wall time, the same until the disk has everything, CPU time, and peak resident memory."""

    seconds: float
    synced_seconds: float
    cpu_seconds: float
    peak_rss_gb: float


def measure(command: list[str]) -> Run:
    """Run a command, from a disk with nothing left to write."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    os.sync()
    synced_seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} ... failed with {process.returncode}")
    return Run(seconds, synced_seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def graph_seconds(checkpoint: Path, target: str) -> float:
    """Time to open the checkpoint and to build the graphs of a target."""
    start = time.perf_counter()
    opened = Checkpoint.open(checkpoint)
    model = read_config(opened.config)
    weights = WeightStore(opened, "float16")
    build_graphs(model.vision, model.language, weights, "float16", target, "l2")
    return time.perf_counter() - start


def run(folder: Path) -> dict[str, float]:
    """Measure everything in a folder that is removed afterwards."""
    checkpoint = make_sparse_checkpoint(folder / "checkpoint")
    shards = sorted(str(path) for path in checkpoint.glob("*.safetensors"))
    result = {f"graphs_{target}_seconds": graph_seconds(checkpoint, target) for target in TARGETS}
    (folder / "copy").mkdir()
    copy = measure(["cp", "--sparse=never", *shards, str(folder / "copy")])
    shutil.rmtree(folder / "copy")
    export = [sys.executable, "-m", "export", str(checkpoint), "--json", "--out"]
    converted = measure([*export, str(folder / "float16"), "--dtype", "float16"])
    result["bundle_gb"] = sum(path.stat().st_size for path in (folder / "float16").iterdir()) / 1e9
    shutil.rmtree(folder / "float16")
    linked = measure([*export, str(folder / "linked"), "--dtype", "bfloat16", "--link"])
    own = [path for path in (folder / "linked").iterdir() if path.suffix != ".safetensors"]
    result["linked_own_mb"] = sum(path.stat().st_size for path in own) / 1e6
    for name, measured in (("copy", copy), ("float16", converted), ("linked", linked)):
        result[f"{name}_seconds"] = measured.seconds
        result[f"{name}_synced_seconds"] = measured.synced_seconds
        result[f"{name}_cpu_seconds"] = measured.cpu_seconds
        result[f"{name}_peak_rss_gb"] = measured.peak_rss_gb
    result["times_copy"] = converted.seconds / copy.seconds
    result["times_copy_synced"] = converted.synced_seconds / copy.synced_seconds
    return result


def make_quantised_checkpoint(folder: Path, method: str, layers: int) -> Path:
    """Write a checkpoint of the 7B's shapes whose language model is int4 of random bits, the rest random float16."""
    sizes, group = replace(QWEN_7B, layers=layers), 128
    parts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, (rows, *columns) in shapes(sizes).items():
        base = named(name, HUB).removesuffix("weight")
        if not name.endswith("_proj.weight") or name.startswith("visual."):
            parts[named(name, HUB)] = ("F16", (rows, *columns), 2)
            continue
        packed = (columns[0], rows // 8) if method == "awq" else (columns[0] // 8, rows)
        parts[f"{base}qweight"] = ("I32", packed, 4)
        parts[f"{base}qzeros"] = ("I32", (columns[0] // group, rows // 8), 4)
        parts[f"{base}scales"] = ("F16", (columns[0] // group, rows), 2)
    settings = {"quant_method": method, "bits": 4, "group_size": group, "zero_point": True, "sym": False}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(sizes) | {"quantization_config": settings})
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(1 << 22, dtype=np.float32).astype(np.float16).tobytes()
    random = {"I32": rng.bytes(len(floats)), "F16": floats}
    header, _ = safetensors_header(parts)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(header)
        for dtype, shape, itemsize in parts.values():
            whole, rest = divmod(int(np.prod(shape)) * itemsize, len(floats))
            for _ in range(whole):
                out.write(random[dtype])
            out.write(random[dtype][:rest])
    return folder


def forget(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_quantised(folder: Path, method: str, layers: int, warm: bool) -> dict[str, float]:
    """The copy, the export and both again, from a quantised checkpoint in a folder that is removed afterwards."""
    checkpoint = make_quantised_checkpoint(folder / "checkpoint", method, layers)
    result, turns = {}, []
    export = [sys.executable, "-m", "export", str(checkpoint), "--dtype", "float16", "--out", str(folder / "bundle")]
    for _ in range(3):
        if not warm:
            forget(checkpoint / "model.safetensors")
        copy = measure(["cp", "--sparse=never", str(checkpoint / "model.safetensors"), str(folder / "copy")])
        (folder / "copy").unlink()
        if not warm:
            forget(checkpoint / "model.safetensors")
        exported = measure(export)
        shutil.rmtree(folder / "bundle")
        times_copy = exported.seconds / copy.seconds if warm else exported.synced_seconds / copy.synced_seconds
        turns.append((times_copy, copy, exported))
    turns.sort(key=lambda turn: turn[0])
    result["times_copy_least"], result["times_copy_most"] = turns[0][0], turns[-1][0]
    result["times_copy"], copy, exported = turns[1]
    for name, measured in (("copy", copy), ("float16", exported)):
        result |= {f"{name}_{key}": value for key, value in asdict(measured).items()}
    result["checkpoint_gb"] = (checkpoint / "model.safetensors").stat().st_size / 1e9
    return result


def main() -> int:
    """Print the figures; returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description="Measure an export of 7B shapes.")
    parser.add_argument("--dir", type=Path, default=Path("artifacts"), help="where the files go for the time being")
    parser.add_argument("--quantised", choices=("awq", "gptq"), help="a checkpoint of int4 instead of bfloat16")
    parser.add_argument(
        "--layers", type=int, default=QWEN_7B.layers, help="of the quantised one (default: %(default)s)"
    )
    parser.add_argument("--warm", action="store_true", help="the quantised one from memory, not from disk to disk")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(args.dir).free / 1e9
    if free_gb < _FREE_GB:
        print(f"error: {args.dir}: {free_gb:.1f} GB free, {_FREE_GB:.0f} GB needed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="export-7b-", dir=args.dir) as folder:
        where = Path(folder)
        result = run_quantised(where, args.quantised, args.layers, args.warm) if args.quantised else run(where)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:26} {value:8.3f}")
    met = (
        result["float16_peak_rss_gb"] <= (MAX_QUANTISED_PEAK_RSS_GB if args.quantised else MAX_PEAK_RSS_GB)
        and result["times_copy"] <= MAX_TIMES_COPY
        and all(result.get(f"graphs_{target}_seconds", 0) < MAX_GRAPH_SECONDS for target in TARGETS)
    )
    print("targets met" if met else "targets missed", file=sys.stderr)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
