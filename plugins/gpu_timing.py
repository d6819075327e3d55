"""The time of a call on a GPU, beside that of the PyTorch operations that it replaces, in the same run.

The median over repeats of many calls in a row between two CUDA events, ours and PyTorch's in turn. "graph" is a
captured graph of many calls, so the time of one on the device; "eager" includes what the host takes to launch. The
inputs stay in the GPU's cache, as they do behind the matrix product that makes the scores.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .cases import random_case
from .gpu_buffers import Buffers
from .kernel_library import Sizes, TopK

LENGTHS = (1, 300, 512, 1300, 4096, 16_384, 65_536)
HEADS = 28
KEEP_RATIO = 0.2
_CALLS_IN_A_ROW = 50
_REPEATS = 15


@dataclass(frozen=True, slots=True)
class Timing:
    """One length of prompt.

    Attributes:
        seq_len: positions of the row.
        num_kept: positions kept.
        what: was called: "kernel", or "enqueue" of the plugin.
        mode: "graph" or "eager".
        microseconds: of a call.
        torch_microseconds: of the PyTorch operations, in the same run.
        ratio: PyTorch's time over ours.
    """

    seq_len: int
    num_kept: int
    what: str
    mode: str
    microseconds: float
    torch_microseconds: float
    ratio: float


def measure(libraries: dict[str, TopK]) -> Iterator[Timing]:
    """Time a call of each library beside PyTorch's operations, at every length."""
    for seq_len in LENGTHS:
        num_kept = max(1, int(np.ceil(seq_len * KEEP_RATIO)))
        case = random_case(0, Sizes(1, HEADS, seq_len, num_kept))
        case.visual_rows[:] = np.arange(seq_len)
        case.select_bias[:] = 0
        for what, library in libraries.items():
            buffers = Buffers(case, library)
            for mode, prepare in (("graph", _graph_of_calls), ("eager", _eager_calls)):
                ours, theirs = _alternately(prepare(partial(buffers.enqueue, library)), prepare(buffers.enqueue_torch))
                yield Timing(seq_len, num_kept, what, mode, ours, theirs, theirs / ours)
        print(f"timed {seq_len} positions", file=sys.stderr)


def _eager_calls(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(_CALLS_IN_A_ROW):
            call()

    return calls


def _graph_of_calls(call: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_IN_A_ROW):
            call()
    return graph.replay


def _alternately(*runs: Callable[[], None]) -> list[float]:
    """Microseconds of one call of each, the runs taking turns so that all meet the same clocks."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_REPEATS):
        for run, measured in zip(runs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            measured.append(start.elapsed_time(end) * 1e3 / _CALLS_IN_A_ROW)
    return [statistics.median(measured) for measured in times]
