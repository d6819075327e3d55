"""One prompt through a loaded pipeline at a few keep ratios: every stage, the first token, a token, device memory."""

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu_report.record import Setting
from hawk_trt import ModelInputs, PruningConfig, Result
from hawk_trt.apps.bench.bench import score_seconds

if TYPE_CHECKING:
    from hawk_trt import Pipeline

# The smallest first: allocators keep what they took, so the memory after a ratio is the most that it needed.
KEEP_RATIOS = (0.1, 0.2, 0.4, 1.0)


def noise_prompt(pipe: "Pipeline", side: int, text_tokens: int = 34) -> ModelInputs:
    """A square noise image of Qwen2.5-VL between random words, as tensors."""
    special = pipe.bundle.manifest.special_tokens
    rng = np.random.default_rng(0)
    words = rng.integers(0, 100, text_tokens)
    blocks = side // 28
    ids = [*words[:4], special.vision_start, *[special.image] * blocks**2, special.vision_end, *words[4:]]
    pixels = rng.standard_normal((4 * blocks**2, 1176), dtype=np.float32)
    return ModelInputs(np.array(ids), None, pixels, np.array([[1, 2 * blocks, 2 * blocks]]))


def effort(setting: Setting) -> tuple[int, int, int]:
    """Rounds; tokens until a step costs what all later ones do; and tokens behind them."""
    return (1, 2, 4) if setting.rehearse else (3, 6, 32)


def measure(
    pipe: "Pipeline", inputs: ModelInputs, keep_ratio: float, used_mb: Callable[[], float], setting: Setting
) -> dict[str, Any]:
    """Medians over rounds, in milliseconds; the first run of a shape, which pays for what is made once, left out."""
    pruning = PruningConfig(keep_ratio)

    def ask(tokens: int) -> Result:
        return pipe.generate(inputs, pruning=pruning, max_new_tokens=tokens, ignore_eos=True)

    rounds, begin, steps = effort(setting)
    ask(begin)
    rows = []
    for _ in range(rounds):
        short, long = ask(begin), ask(begin + steps)
        times = long.timings
        rows.append(
            {
                "vision": times.vision,
                "score": score_seconds(pipe, inputs, pruning),
                "first_layer": times.first_layer,
                "decoder": times.decoder,
                "first_token": times.total - times.decode,
                "token": (times.decode - short.timings.decode) / steps,
            }
        )
    return {
        "keep_ratio": keep_ratio,
        "kept": long.num_kept,
        "of": long.num_visual,
        **{f"{name}_ms": round(1e3 * statistics.median(row[name] for row in rows), 3) for name in rows[0]},
        "memory_mb": round(used_mb()),
    }
