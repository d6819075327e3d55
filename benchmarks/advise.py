"""How far `hawk-trt advise` is off: predicted against measured times, at keep ratios and lengths it never saw.

In: a bundle, with or without a tokenizer. Out: a table, medians of several rounds; the runs that the prediction is
made from and those that check it take turns, so that both see the same machine.

    python -m benchmarks.advise artifacts/tiny-vlm
    taskset -c 0 python -m benchmarks.advise artifacts/tiny-vlm --cpu-seconds      on a machine that others use too
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.bench.advice import MEASURED_RATIOS, TimeModel, measure_once, medians, prompt_size
from hawk_trt.request import ModelInputs, Result
from hawk_trt.runtime.reference import random_inputs

CHECKED_RATIOS = (0.7, 0.2, 0.1)
LENGTHS = (1, 32, 128)


def main() -> int:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="exported bundle")
    parser.add_argument("--image-size", type=int, default=448, help="height and width of the noise (default: 448)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--target", help="default: the best there is")
    parser.add_argument("--cpu-seconds", action="store_true", help="the process's CPU time instead of the clock's")
    args = parser.parse_args()
    if args.cpu_seconds:
        time.perf_counter = time.process_time  # the pipeline's clock too
    with Pipeline.load(args.bundle, target=args.target, vision_cache_mb=0) as pipe:
        size = args.image_size
        inputs: ModelInputs = random_inputs(pipe.bundle.manifest, np.random.default_rng(0), [(size, size)], 0)

        def ask(pruning: PruningConfig, new_tokens: int) -> Result:
            return pipe.generate(inputs, pruning=pruning, max_new_tokens=new_tokens, ignore_eos=True)

        cases = [(ratio, length) for ratio in CHECKED_RATIOS for length in LENGTHS]
        fitted: list[list] = [[] for _ in MEASURED_RATIOS]
        checked: list[list[float]] = [[] for _ in cases]
        for number in range(args.rounds + 1):
            for place, ratio in enumerate(MEASURED_RATIOS):
                times = measure_once(ask, ratio)
                if number:  # the first round pays for what is made once
                    fitted[place].append(times)
            for place, (ratio, length) in enumerate(cases):
                total = ask(PruningConfig(keep_ratio=ratio), length).timings.total
                if number:
                    checked[place].append(total)
        model = TimeModel(prompt_size(pipe, ask(PruningConfig(keep_ratio=1.0), 1)), [medians(runs) for runs in fitted])
        print(
            f"{args.bundle}: {pipe.backend.target}, {model.size.num_text} text, {model.size.num_visual} visual tokens"
        )
    print("keep ratio  new tokens  predicted, ms  measured, ms   error")
    errors = []
    for (ratio, length), seconds in zip(cases, checked, strict=True):
        measured, predicted = float(np.median(seconds)), model.predict(ratio, length).total
        errors.append(predicted / measured - 1.0)
        print(
            f"{ratio:10g}  {length:10d}  {1000 * predicted:13.1f}  {1000 * measured:12.1f}  {100 * errors[-1]:+5.1f} %"
        )
    print(f"largest error {100 * max(map(abs, errors)):.1f} %, mean {100 * float(np.mean(np.abs(errors))):.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
