"""ONNX Runtime's CUDA provider: the tiny models token by token against the CPU, then the stages of random weights.

A rehearsal runs over stub CUDA libraries where it can: the provider's own code does all but compute. What comes back is
read as zeros then, and nothing is compared.
"""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # before onnxruntime: it brings the CUDA libraries, cuDNN among them

from benchmarks.gpu_report import models, stages
from benchmarks.gpu_report.record import Record, Setting

if TYPE_CHECKING:
    from hawk_trt import Pipeline, Result

_TINY_DTYPES = ("float32", "float16", "bfloat16", "int4")
_QUESTIONS = 8
_NEW_TOKENS = 12
_KEEP_RATIOS = (1.0, 0.2)
_EXACT = "float32"  # in the other dtypes two close tokens may change places


def tiny(record: Record, setting: Setting) -> None:
    """Answers of the tiny model on the GPU, token by token against the CPU."""
    _against_the_cpu(models.CHECKPOINT, record, setting)


def hybrid(record: Record, setting: Setting) -> None:
    """The same of the tiny hybrid, whose layer 0 has no attention."""
    _against_the_cpu(models.HYBRID, record, setting)


def _against_the_cpu(checkpoint: Path, record: Record, setting: Setting) -> None:
    from hawk_trt import Pipeline

    device = provider_device(setting)
    record.put(model=checkpoint.name)
    for dtype in _TINY_DTYPES if device != "cpu" else [dtype for dtype in _TINY_DTYPES if dtype != "bfloat16"]:
        with record.row_or_reason("dtypes", dtype=dtype) as row:
            # ONNX Runtime's CPU provider has no bfloat16: float32 is what its answers are compared with
            reference = models.tiny_bundle(_EXACT if dtype == "bfloat16" else dtype, setting, checkpoint)
            with Pipeline.load(reference) as pipe:
                expected = list(_answers(pipe, setting))
            with Pipeline.load(models.tiny_bundle(dtype, setting, checkpoint), device=device) as pipe:
                row["runs"] = pipe.backend.target
                got = list(_answers(pipe, setting))
            if computes(setting, device):
                agreement(row, got, expected, exact=dtype == _EXACT)
    record.raise_failures("dtypes")


def shape_bfloat16(record: Record, setting: Setting) -> None:
    """The stages of random weights in bfloat16."""
    _shape("bfloat16", record, setting)


def shape_float16(record: Record, setting: Setting) -> None:
    """The stages of random weights in float16."""
    _shape("float16", record, setting)


def _shape(dtype: str, record: Record, setting: Setting) -> None:
    from hawk_trt import Pipeline

    device = provider_device(setting)
    if device == "cpu":
        dtype = "float32"  # what every CPU runs
    begun = time.perf_counter()
    bundle = models.shape_bundle(dtype, setting)
    exported = time.perf_counter()
    used_mb = memory_meter(setting)
    with Pipeline.load(bundle, device=device, vision_cache_mb=0) as pipe:
        record.put(
            model=models.model_name(setting),
            dtype=dtype,
            runs=pipe.backend.target,
            export_s=round(exported - begun, 1),
            load_s=round(time.perf_counter() - exported, 1),
            weights_mb=round(used_mb()),
        )
        inputs = stages.noise_prompt(pipe, 224 if setting.small else setting.side)
        for capture in (False, True) if device != "cpu" else (False,):
            pipe.backend.place.capture = capture
            for ratio in stages.KEEP_RATIOS:
                with record.row_or_reason("stages", keep_ratio=ratio, cuda_graph=capture) as row:
                    row |= stages.measure(pipe, inputs, ratio, used_mb, setting)
        record.put(graphs_captured=pipe.backend.place.num_captured)
    record.raise_failures("stages")


def memory_meter(setting: Setting) -> Callable[[], float]:
    """Megabytes of the device's memory taken since now, whoever took them; in a rehearsal, the process's peak."""
    if setting.rehearse:
        return lambda: _peak_resident_mb()
    before = torch.cuda.mem_get_info()[0]
    return lambda: (before - torch.cuda.mem_get_info()[0]) / 1e6


def _peak_resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def provider_device(setting: Setting) -> str:
    """Where ONNX Runtime computes; over the stub libraries it reads zeros back, which are no garbage to index with."""
    if not setting.rehearse:
        return "cuda"
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "cpu"
    read = ort.OrtValue.numpy
    ort.OrtValue.numpy = lambda value: np.zeros_like(read(value))
    return "cuda"


def _answers(pipe: "Pipeline", setting: Setting) -> Iterator["Result"]:
    from examples.tiny_task import generate
    from hawk_trt import PruningConfig

    for sample in generate(11, 1 if setting.small else _QUESTIONS):
        for ratio in _KEEP_RATIOS:
            yield pipe.generate(
                sample.question,
                [sample.image],
                pruning=PruningConfig(ratio),
                max_new_tokens=_NEW_TOKENS,
                ignore_eos=True,
                return_logits=True,
            )


def computes(setting: Setting, device: str) -> bool:
    """Whether what comes back was computed, and is not what the stub libraries leave."""
    return not setting.rehearse or device == "cpu"


def agreement(row: dict[str, Any], got: "list[Result]", expected: "list[Result]", *, exact: bool) -> None:
    """Fill in how far answers agree; RuntimeError where their tokens should be the same and are not."""
    pairs = list(zip(got, expected, strict=True))
    first = [np.abs(a.logits[0] - b.logits[0]).max() / np.abs(b.logits[0]).max() for a, b in pairs]
    equal = sum(a.token_ids == b.token_ids for a, b in pairs)
    row |= {
        "answers": len(pairs),
        "answers_equal": equal,
        "kept_sets_equal": sum(np.array_equal(a.kept_indices, b.kept_indices) for a, b in pairs),
        "scores_error": float(max(np.abs(a.scores - b.scores).max() for a, b in pairs)),
        "logits_error": float(max(first)),
    }
    if exact and equal < len(pairs):
        raise RuntimeError(f"{len(pairs) - equal} of {len(pairs)} answers are not those of the CPU")
