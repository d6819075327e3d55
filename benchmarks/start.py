"""Import time, start-up time and peak memory of the runtime, each in a process of its own: `make bench-start`.

In: a bundle and an image. Out: a table, medians of several runs.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; seconds it took and its peak resident memory in MB."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="exported bundle")
    parser.add_argument("--image", default="examples/tiny-vlm/samples/0-colour.png", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    run = [sys.executable, "-m", "hawk_trt", "run", str(args.bundle.resolve())]
    # the peak of all children so far grows with each row, so the smallest comes first
    rows = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import hawk_trt": [sys.executable, "-c", "import hawk_trt"],
        "hawk-trt run --help": [sys.executable, "-m", "hawk_trt", "run", "--help"],
        "hawk-trt run, one image": [*run, "--image", args.image, "--prompt", "What colour is the heart?"],
    }
    for name, command in rows.items():
        measured = [measure(command) for _ in range(args.repeats)]
        seconds = statistics.median(seconds for seconds, _ in measured)
        print(f"{name:26s} {1000 * seconds:8.0f} ms   peak {measured[-1][1]:6.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
