"""transformers' Qwen2.5-VL of the same shape, random weights made on the card, bfloat16, SDPA: nothing pruned."""

import statistics
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu_report import models, stages
from benchmarks.gpu_report.provider import memory_meter
from benchmarks.gpu_report.record import Record, Setting, Skipped

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def transformers(record: Record, setting: Setting) -> None:
    """The first token, a token and memory of the prompt that the shape phases measure."""
    try:
        import transformers as library
    except ImportError as error:
        raise Skipped(f"transformers is not installed ({error})") from error
    used_mb = memory_meter(setting)
    config = models.config(setting)
    model = _model(library, config, setting)
    weights_mb = used_mb()
    inputs = _prompt(config, 224 if setting.small else setting.side, setting)
    marks: list[float] = []
    model.model.visual.register_forward_pre_hook(lambda *_: marks.append(_now(setting)))
    model.model.visual.register_forward_hook(lambda *_: marks.append(_now(setting)))

    def ask(tokens: int) -> float:
        begun = _now(setting)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return _now(setting) - begun

    rounds, begin, steps = stages.effort(setting)
    ask(begin)
    found = []
    for _ in range(rounds):
        marks.clear()
        first = ask(1)
        found.append((marks[1] - marks[0], first, (ask(begin + steps) - ask(begin)) / steps))
    vision, first, token = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
    record.put(
        model=models.model_name(setting),
        dtype=str(_dtype(setting)).removeprefix("torch."),
        transformers=library.__version__,
        attention=model.config._attn_implementation,
        vision_ms=round(vision, 3),
        first_token_ms=round(first, 3),
        token_ms=round(token, 3),
        weights_mb=round(weights_mb),
        memory_mb=round(used_mb()),
    )


def _model(library: ModuleType, config: dict[str, Any], setting: Setting) -> "Qwen2_5_VLForConditionalGeneration":
    """The model of a config with the weights that its constructor draws."""
    settings = library.Qwen2_5_VLConfig(**{name: value for name, value in config.items() if name != "architectures"})
    settings._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(setting))
    try:
        with torch.device(setting.torch_device):
            return library.Qwen2_5_VLForConditionalGeneration(settings).eval()
    finally:
        torch.set_default_dtype(before)


def _prompt(config: dict[str, Any], side: int, setting: Setting) -> dict[str, torch.Tensor]:
    """The tensors of stages.noise_prompt as transformers takes them."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 100, 34)
    blocks = side // 28
    ids = [
        *words[:4],
        config["vision_start_token_id"],
        *[config["image_token_id"]] * blocks**2,
        config["vision_end_token_id"],
        *words[4:],
    ]
    input_ids = torch.tensor([ids])
    pixels = torch.from_numpy(rng.standard_normal((4 * blocks**2, 1176), dtype=np.float32)).to(_dtype(setting))
    tensors = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == config["image_token_id"]).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2 * blocks, 2 * blocks]]),
    }
    return {name: tensor.to(setting.torch_device) for name, tensor in tensors.items()}


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float32 if setting.rehearse else torch.bfloat16  # CPUs take long for bfloat16


def _now(setting: Setting) -> float:
    if not setting.rehearse:
        torch.cuda.synchronize()
    return time.perf_counter()
