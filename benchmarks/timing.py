"""Times of one request by stage, ours and peers', and their medians over interleaved rounds."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.apps.bench.bench import score_seconds

STAGES = ("vision", "score", "first_layer", "decoder", "decode_step", "total")


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one request."""

    vision: float
    score: float
    first_layer: float
    decoder: float  # the prefill; score is a part of first_layer
    decode_step: float  # one generated token
    total: float  # from pixel values to the last token
    token_ids: tuple[int, ...]  # generated
    num_kept_total: int  # tokens in the KV cache after the prefill

    @property
    def prefill(self) -> float:
        """First layer and decoder."""
        return self.first_layer + self.decoder


def run_ours(pipe: Pipeline, inputs: ModelInputs, keep_ratio: float, max_new_tokens: int) -> Times:
    """Answer a prompt with a pipeline."""
    pruning = PruningConfig(keep_ratio)
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=max_new_tokens, ignore_eos=True)
    times = result.timings
    return Times(
        vision=1e3 * times.vision,
        score=1e3 * score_seconds(pipe, inputs, pruning),
        first_layer=1e3 * times.first_layer,
        decoder=1e3 * times.decoder,
        decode_step=1e3 * times.decode / max(len(result.token_ids) - 1, 1),
        total=1e3 * times.total,
        token_ids=tuple(result.token_ids),
        num_kept_total=len(result.kept_indices),
    )


def interleave(
    runs: Mapping[str, Callable[[], Times]], rounds: int, warmup: int = 1, step: Callable[[], None] = lambda: None
) -> dict[str, list[Times]]:
    """Run all after each other, round by round, so that a machine that slows down slows all alike."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            times = run()
            if number >= warmup:
                found[name].append(times)
            step()
    return found


def median(times: Sequence[Times]) -> Times:
    """The median of each number; tokens are the first run's."""
    numbers = {
        field.name: statistics.median(getattr(one, field.name) for one in times)
        for field in fields(Times)
        if field.name in STAGES
    }
    return Times(**numbers, token_ids=times[0].token_ids, num_kept_total=times[0].num_kept_total)


def ratio(slow: Sequence[Times], fast: Sequence[Times], stage: str) -> float:
    """How many times faster, as the median over the rounds of the ratio within each."""
    return statistics.median(getattr(one, stage) / getattr(other, stage) for one, other in zip(slow, fast, strict=True))


def load() -> str:
    """How busy the machine is: processes that want a core over the last minute, and cores."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def processor_name() -> str:
    """What /proc/cpuinfo calls the processor, and the instruction sets that decide how fast matrices multiply."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    said = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(said.get("flags", said.get("Features", "")).split())
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    model = said.get("model name", platform.machine())
    return f"{model} (family {said.get('cpu family')}, model {said.get('model')}; {', '.join(sets) or 'no AVX'})"
