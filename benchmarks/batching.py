"""Batching against one by one: `make bench-batching`.

So many clients, each of which asks again as soon as it is answered, every request an image and a text; once through
generate behind a lock, one answer after the other, and once through the batcher with several limits of rows a step.
Out: answers a second, the median and 95th percentile of what a client waits, and processor time an answer, which other
work on the machine disturbs least. Modes take turns, round by round, so that a machine that slows down slows all alike;
a ratio is the median over the rounds of the ratio to one by one within each.

In: a bundle, or none: then one of the 3B's width is made, random weights, four language layers, two vision layers and
a vocabulary cut in proportion (1.5 GB of disk, 4 GB of memory).
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import load
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.serve.batcher import Batcher, Event
from hawk_trt.errors import HawkError
from hawk_trt.request import Request, Result
from hawk_trt.runtime.reference import random_inputs

Answer = Callable[[Request], Result]
ONE_BY_ONE = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode over one round: answers a second, processor seconds an answer, seconds that each client waited."""

    rate: float
    processor: float
    waits: tuple[float, ...]


def answer_one_by_one(pipe: Pipeline) -> Answer:
    """Generate, behind a lock."""
    lock = threading.Lock()

    def answer(job: Request) -> Result:
        with lock:
            return pipe.generate_batch([job])[0]

    return answer


def answer_batched(batcher: Batcher) -> Answer:
    """Submit, and wait for the last event."""

    def answer(job: Request) -> Result:
        ended = threading.Event()
        last: list[Event] = []

        def hear(event: Event) -> None:
            if isinstance(event, Result | HawkError):
                last.append(event)
                ended.set()

        batcher.submit(job, hear)
        ended.wait()
        if isinstance(last[0], HawkError):
            raise last[0]
        assert isinstance(last[0], Result)
        return last[0]

    return answer


def measure(answer: Answer, jobs: Sequence[Request], concurrency: int, expected: dict[int, list[int]]) -> Measured:
    """Let the clients ask for all jobs; every answer must be the expected one, or the first for its job."""
    left: Iterator[Request] = iter(jobs)
    taking = threading.Lock()
    waits: list[float] = []
    wrong: list[Request] = []

    def client() -> None:
        while True:
            with taking:
                job = next(left, None)
            if job is None:
                return
            begun = time.perf_counter()
            result = answer(job)
            waits.append(time.perf_counter() - begun)
            if expected.setdefault(id(job), result.token_ids) != result.token_ids:
                wrong.append(job)

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    begun, used = time.perf_counter(), time.process_time()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    if wrong or len(waits) != len(jobs):
        raise SystemExit(f"{len(wrong)} of {len(jobs)} answers differ from those of generate, {len(waits)} came")
    return Measured(len(jobs) / seconds, used / len(jobs), tuple(waits))


def make_jobs(pipe: Pipeline, args: argparse.Namespace, keep_ratio: float) -> list[Request]:
    """Prompts with a noise image each, of four sizes around the given side, and answers of unlike lengths."""
    rng = np.random.default_rng(0)
    jobs = []
    for number in range(max(args.answers, *args.concurrency)):
        side = args.side * (3 + number % 4) // 4
        inputs = random_inputs(pipe.bundle.manifest, rng, [(side, side)], 0)
        new_tokens = args.new_tokens * (2 + number % 5) // 4  # half to one and a half of what was asked for
        jobs.append(Request(inputs, (), (), PruningConfig(keep_ratio), max(new_tokens, 1), ignore_eos=True))
    return jobs


def compare(pipe: Pipeline, args: argparse.Namespace, keep_ratio: float, concurrency: int) -> None:
    """Print the rows of one keep ratio and one number of clients."""
    jobs = make_jobs(pipe, args, keep_ratio)[: max(args.answers, concurrency)]
    modes = [ONE_BY_ONE, *(rows for rows in args.max_batch if rows <= max(concurrency, min(args.max_batch)))]
    found: dict[int, list[Measured]] = {mode: [] for mode in modes}
    expected: dict[int, list[int]] = {}
    for _ in range(args.rounds):
        for mode in modes:
            if mode == ONE_BY_ONE:
                found[mode].append(measure(answer_one_by_one(pipe), jobs, concurrency, expected))
                continue
            with Batcher(pipe, max_batch=mode) as batcher:
                found[mode].append(measure(answer_batched(batcher), jobs, concurrency, expected))
    plain = found[ONE_BY_ONE]
    for mode, rounds in found.items():
        waits = [wait for measured in rounds for wait in measured.waits]
        middle, late = np.percentile(waits, (50, 95)).tolist()
        rate = statistics.median(measured.rate for measured in rounds)
        gain = statistics.median(one.rate / other.rate for one, other in zip(rounds, plain, strict=True))
        used = statistics.median(measured.processor for measured in rounds)
        spared = statistics.median(other.processor / one.processor for one, other in zip(rounds, plain, strict=True))
        name = "one by one" if mode == ONE_BY_ONE else f"batches of up to {mode}"
        print(
            f"| {keep_ratio:g} | {concurrency} | {name} | {rate:.2f} | {gain:.2f}x | {1e3 * middle:,.0f} "
            f"| {1e3 * late:,.0f} | {1e3 * used:,.1f} | {spared:.2f}x |",
            flush=True,
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="(default: the 3B's width, random weights)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/batching"), help="(default: %(default)s)")
    parser.add_argument("--target", help="(default: the best that runs)")
    parser.add_argument("--threads", type=int, default=2, help="of each stage (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 32], help="clients")
    parser.add_argument("--max-batch", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="rows a step")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.2, 1.0])
    parser.add_argument("--side", type=int, default=224, help="of the images, pixels (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--answers", type=int, default=32, help="of a round, at least (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    folder = args.bundle
    if folder is None:
        _, folder = make_model(args.out, cut_config("qwen2.5-vl-3b", 4, vision_layers=2))
    with Pipeline.load(folder, target=args.target, threads=args.threads, vision_cache_mb=0) as pipe:
        measure(answer_one_by_one(pipe), make_jobs(pipe, args, 1.0)[:2], 1, {})  # warm
        print(f"{folder}, {pipe.backend.target}, {args.threads} threads, {load()}\n")
        print(
            "| kept | clients | how | answers/s | gain | median wait, ms | 95 %, ms | processor, ms an answer | gain |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for keep_ratio in args.keep_ratios:
            for concurrency in args.concurrency:
                compare(pipe, args, keep_ratio, concurrency)
        print(f"\n{load()} at the end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
