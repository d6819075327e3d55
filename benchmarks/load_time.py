"""Time to load the sessions of a bundle: graphs optimised as they are loaded, or before and saved: `make bench-load`.

In: a bundle; made for the purpose, one of random weights at the 3B's width. A copy of the folder, its weight files
linked, gets each graph as ONNX Runtime's optimiser leaves it. The two load in turn, in processes of their own. Out:
milliseconds by stage, and the bytes that the saved graphs take.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime as ort

from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load
from hawk_trt.bundle import Bundle
from hawk_trt.stages import STAGES, TARGETS

WAYS = ("as they are", "optimised before")


def session(path: Path, *, saved: Path | None = None, optimised: bool = False) -> ort.InferenceSession:
    """Load a graph, as the backend does; saved: write what the optimiser made there."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def save_optimised(bundle: Bundle, target: str, folder: Path) -> int:
    """The optimised graphs beside links to the weights; the bytes that were written."""
    for weights in _weights(bundle.folder):
        os.link(weights, folder / weights.name)  # ONNX Runtime follows no symbolic link out of the folder
    for stage in STAGES:
        name = bundle.manifest.graph(stage, target).file
        graph = folder / f"plain-{name}"  # in the folder where its weights are looked for
        graph.write_bytes((bundle.folder / name).read_bytes())
        session(graph, saved=folder / name)
        graph.unlink()
    return sum(path.stat().st_size for path in folder.iterdir() if path.stat().st_nlink == 1)


def _weights(folder: Path) -> list[Path]:
    """What the graphs refer to: files of their own, or the linked checkpoint."""
    return [*folder.glob("*.data"), *folder.glob("*.safetensors")]


def load_ms(folder: Path, files: list[str], optimised: str) -> list[float]:
    """Milliseconds of each graph's session, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load_time", "--graphs", optimised, *(str(folder / f) for f in files)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    times: list[float] = json.loads(done.stdout)
    return times


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*", help="(default: random weights of the 3B's width)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/load"), help="(default: %(default)s)")
    parser.add_argument("--graphs", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.graphs:
        times = []
        for graph in args.graphs[1:]:
            begun = time.perf_counter()
            session(Path(graph), optimised=args.graphs[0] == WAYS[1])
            times.append(1e3 * (time.perf_counter() - begun))
        print(json.dumps(times))
        return 0
    bundles = args.bundles or [make_model(args.out, cut_config("qwen2.5-vl-3b", layers=3, vision_layers=2))[1]]
    print(f"onnxruntime {ort.__version__}, {os.cpu_count()} threads, medians of {args.rounds} rounds, ms")
    for folder in bundles:
        bundle = Bundle.load(folder)
        for target in (name for name in TARGETS if name in bundle.manifest.targets):
            files = [bundle.manifest.graph(stage, target).file for stage in STAGES]
            with TemporaryDirectory(dir=folder) as temporary:
                written = save_optimised(bundle, target, Path(temporary))
                folders = dict(zip(WAYS, (bundle.folder, Path(temporary)), strict=True))
                found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
                for number in range(1 + args.rounds):
                    for way in WAYS:
                        times = load_ms(folders[way], files, way)
                        if number:
                            found[way].append(times)
            weights = sum(path.stat().st_size for path in _weights(folder))
            print(f"{folder}, {target}: {written / 1e6:,.1f} MB written, for {weights / 1e6:,.1f} MB of weights")
            for way, rounds in found.items():
                medians = [statistics.median(stage) for stage in zip(*rounds, strict=True)]
                cells = ", ".join(f"{stage} {ms:,.0f}" for stage, ms in zip(STAGES, medians, strict=True))
                print(f"  {way:20s}{statistics.median(map(sum, rounds)):8,.0f} in all; {cells}")
    print(load())
    return 0


if __name__ == "__main__":
    sys.exit(main())
