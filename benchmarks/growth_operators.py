"""Which operators of a prefill grow faster than the prompt, by ONNX Runtime's profiler.

Two prompts enter; of each operator, named after its last scope and its type, leaves its share of the larger
prefill and the exponent of its growth: 1 is linear, 2 quadratic.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime as ort

from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.stages import DECODER, FIRST_LAYER

MIN_SHARE = 0.005
_RUNS = 4


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
    pruning = PruningConfig(1.0)
    stages = [pipe.backend.stages[name] for name in (FIRST_LAYER, DECODER)]
    whole = [stage.session for stage in stages]
    found: dict[str, float] = defaultdict(float)
    with TemporaryDirectory() as folder:
        try:
            for stage in stages:
                options = ort.SessionOptions()
                options.intra_op_num_threads = 1
                options.log_severity_level = 3
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder) / stage.entry.stage)
                stage.session = ort.InferenceSession(str(pipe.bundle.folder / stage.entry.file), options)
            for _ in range(_RUNS):
                pipe.generate(inputs, pruning=pruning, max_new_tokens=1)
            for stage in stages:
                events = json.loads(Path(stage.session.end_profiling()).read_text())
                nodes = [event for event in events if event["name"].endswith("_kernel_time")]
                count = len(nodes) // _RUNS  # every run computes the same nodes, one after the other
                for place in range(count, 2 * count):
                    event = nodes[place]
                    scope = event["name"].removesuffix("_kernel_time").rpartition("/")[2]
                    spent = min(other["dur"] for other in nodes[place::count])
                    found[f"{scope} ({event['args']['op_name']})"] += spent / 1e3
        finally:
            for stage, session in zip(stages, whole, strict=True):
                stage.session = session
    return found
