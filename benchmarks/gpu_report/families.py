"""ONNX Runtime's CUDA provider against the CPU: a small random model of every family.

In: the configs of preflight.py, whose heads have the released sizes. Out: for each family and dtype how far scores and
logits are from those of the CPU in float32; in float32 the tokens must be the same. A rehearsal without the stub
libraries compares the CPU with itself; over them nothing is compared.
"""

from pathlib import Path

import numpy as np

from benchmarks.gpu_report.preflight import small_configs
from benchmarks.gpu_report.provider import agreement, computes, provider_device
from benchmarks.gpu_report.record import Record, Setting, Skipped
from export.random_checkpoint import random_checkpoint
from export.writer import ExportOptions, export
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Result
from hawk_trt.stages import CPU, CUDA

_EXACT, _DTYPES = "float32", ("float32", "float16", "bfloat16")
_KEEP_RATIOS = (1.0, 0.2)
_SIDE = 448  # pixels: 196 or 256 visual tokens
_NEW_TOKENS = 8
_IM_END, _VISION_END, _IMAGE = 300, 301, 310  # token ids of the configs


def families(record: Record, setting: Setting) -> None:
    """Answers of every family on the GPU, held against those of the CPU."""
    try:
        configs = list(small_configs().items())
    except ImportError as error:
        raise Skipped(f"transformers is not installed ({error})") from error
    device = provider_device(setting)
    dtypes = _DTYPES if device != "cpu" else _DTYPES[:1]  # half precision is for a GPU's graphs
    record.put(model="a small random model")
    for name, config in configs[: 1 if setting.small else None]:
        source = setting.work / "families" / name / "checkpoint"
        source.mkdir(parents=True, exist_ok=True)
        expected: list[Result] = []
        for dtype in dtypes:
            with record.row_or_reason("dtypes", dtype=f"{name}, {dtype}") as row:
                targets = (CPU, CUDA) if dtype == _EXACT else (CUDA,)
                options = ExportOptions(dtype, targets, im_end_token_id=_IM_END, vision_end_token_id=_VISION_END)
                folder = export(random_checkpoint(source, config), source.with_name(dtype), options, name=name).folder
                if dtype == _EXACT:
                    expected = _answers(folder, "cpu")
                row["runs"] = device
                got = _answers(folder, device)
                if computes(setting, device):
                    agreement(row, got, expected, exact=dtype == _EXACT)
    record.raise_failures("dtypes")


def _answers(folder: Path, device: str) -> list[Result]:
    with Pipeline.load(folder, device=device) as pipe:
        inputs = _prompt(pipe)
        return [
            pipe.generate(
                inputs,
                pruning=PruningConfig(ratio),
                max_new_tokens=_NEW_TOKENS,
                ignore_eos=True,
                return_logits=True,
            )
            for ratio in _KEEP_RATIOS
        ]


def _prompt(pipe: Pipeline) -> ModelInputs:
    """Random words around a picture of noise."""
    family, rng = pipe.family, np.random.default_rng(0)
    picture = rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    patches = family.images_to_patches([picture], family.image_settings({}))
    tokens = int(family.vision.tokens_per_item(patches.grid_thw).sum())
    before, question, after = (rng.integers(0, 290, count).tolist() for count in (4, 8, 2))
    ids = [*before, *[_IMAGE] * tokens, _VISION_END, *question, _IM_END, *after]
    return family.model_inputs(np.array(ids), [patches])
