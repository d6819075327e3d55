"""Which operators of a prefill grow faster than the prompt, by ONNX Runtime's profiler.

Two prompts enter; of each operator, named after its last scope and its type, leaves its share of the larger
prefill and the exponent of its growth: 1 is linear, 2 quadratic.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort

from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.stages import DECODER, FIRST_LAYER

MIN_SHARE = 0.005
_RUNS = 4
_NODE = "_kernel_time"  # ends the names of such events


@dataclass(frozen=True)
class OperatorGrowth:
    """One operator."""

    name: str  # its last scope and its type
    share: float  # of the larger prefill's time
    exponent: float  # of the growth of its time with the number of tokens


def operator_growth(pipe: Pipeline, small: ModelInputs, large: ModelInputs) -> list[OperatorGrowth]:
    """All operators of some share, the largest first."""
    times = [_operator_ms(pipe, inputs) for inputs in (small, large)]
    whole = sum(times[1].values())
    doublings = math.log(len(large.input_ids) / len(small.input_ids))
    rows = [
        OperatorGrowth(name, spent / whole, math.log(spent / times[0][name]) / doublings)
        for name, spent in times[1].items()
        if spent >= MIN_SHARE * whole
    ]
    return sorted(rows, key=lambda row: row.share, reverse=True)


def _operator_ms(pipe: Pipeline, inputs: ModelInputs) -> dict[str, float]:
    """Milliseconds of each operator in an unpruned prefill: of each node the least of all runs but the first."""
    found: dict[str, float] = defaultdict(float)
    for nodes in node_events(pipe, (FIRST_LAYER, DECODER), inputs, 1.0, _RUNS, threads=1):
        count = len(nodes) // _RUNS  # every run computes the same nodes, one after the other
        for place in range(count, 2 * count):
            scope = nodes[place]["name"].removesuffix(_NODE).rpartition("/")[2]
            spent = min(other["dur"] for other in nodes[place::count])
            found[f"{scope} ({nodes[place]['args']['op_name']})"] += spent / 1e3
    return found


def node_events(
    pipe: Pipeline, names: Sequence[str], inputs: ModelInputs, keep_ratio: float, runs: int, threads: int = 0
) -> list[list[dict[str, Any]]]:
    """What ONNX Runtime's profiler tells of each node of some stages, over so many prefills."""
    stages = [pipe.backend.stages[name] for name in names]
    whole = [stage.session for stage in stages]
    with TemporaryDirectory() as folder:
        try:
            for stage in stages:
                options = ort.SessionOptions()
                options.intra_op_num_threads = threads
                options.log_severity_level = 3
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder) / stage.entry.stage)
                stage.session = ort.InferenceSession(str(pipe.bundle.folder / stage.entry.file), options)
            for _ in range(runs):
                pipe.generate(inputs, pruning=PruningConfig(keep_ratio), max_new_tokens=1)
            events = [json.loads(Path(stage.session.end_profiling()).read_text()) for stage in stages]
        finally:
            for stage, session in zip(stages, whole, strict=True):
                stage.session = session
    return [[event for event in of_stage if event["name"].endswith(_NODE)] for of_stage in events]
