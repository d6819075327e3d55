"""Memory over many answers: `make bench-memory`. Exit 1 where it grows by more than 1 MB.

In: a bundle. Questions about pictures of several sizes follow each other, alone and in batches, pruned and not, with
the vision cache on. Out: resident memory (VmRSS) every fifty answers, and the median of the second half against that of
the first: single readings catch what ONNX Runtime is about to give back.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

from hawk_trt import Pipeline, PruningConfig, Request

_WARM_UP = 200
_MAX_GROWTH_MB = 1.0
_EVERY = 50


def resident_mb(metric: str = "VmRSS") -> float:
    """Memory of this process as Linux counts it: VmRSS is resident now, VmHWM its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(metric))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=int, default=1000, help="after a warm-up (default: %(default)s)")
    parser.add_argument("--target", help="(default: the best that runs)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    seen = []
    with Pipeline.load(args.bundle, target=args.target, vision_cache_mb=4) as pipe:
        for number in range(_WARM_UP + args.answers + 1):
            if number >= _WARM_UP and (number - _WARM_UP) % _EVERY == 0:
                seen.append(resident_mb())
                print(f"{number - _WARM_UP:6d} answers {seen[-1]:10.2f} MB", flush=True)
            side = 56 * (1 + number % 4)
            image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            pruning = PruningConfig((0.2, 1.0)[number // 4 % 2])
            if number % 10:
                pipe.generate("What is red?", [image], pruning=pruning, max_new_tokens=8, ignore_eos=True)
            else:
                pipe.generate_batch([Request("What is red?", [image]), "Hello?"], pruning, max_new_tokens=8)
    half = len(seen) // 2
    growth = statistics.median(seen[half:]) - statistics.median(seen[:half])
    print(f"{growth:+.2f} MB from the first half to the second, expected at most {_MAX_GROWTH_MB:+g}")
    return int(growth > _MAX_GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
