"""What pruning must bring on the CPU, measured in one interleaved run: `make bench-claims`.

The model has the 7B's width, three of its language layers and random weights, one vision layer, and a vocabulary cut
in proportion; the prompt is a 1008 x 1008 image and 34 text tokens. It runs in ONNX Runtime and, on the same weights,
tensors and number of threads, in transformers (float32, not compiled), pruned and not. Out: a table of ratios, and
exit 1 where a claim does not hold. Ten minutes, 4 GB of disk, 8 GB of memory.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.random_model import cut_config, make_model
from benchmarks.timing import STAGES, Times, interleave, load, median, ratio, run_ours
from benchmarks.torch_stages import TorchStages
from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.stages import FIRST_LAYER

KEPT = 0.2
MAX_SELECTOR_SHARE = 0.02
MIN_PREFILL_GAIN = 3.8
MIN_TOTAL_GAIN = 1.5
MAX_KV_SHARE = 0.25
MAX_KNOWN_VISION_SHARE = 0.01
# The selector: scores, top-k and gather, by the names of their nodes.
_SELECTOR_NODES = ("hawk/", "_inlfunc_WeightedTopK", "gather/")


def noise_prompt(pipe: Pipeline, side: int, text_tokens: int = 32) -> ModelInputs:
    """A square noise image between random words."""
    special = pipe.bundle.manifest.special_tokens
    blocks = side // 28
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1000, text_tokens)
    ids = [*words[:8], special.vision_start, *[special.image] * blocks**2, special.vision_end, *words[8:]]
    pixels = rng.standard_normal((4 * blocks**2, 1176), dtype=np.float32)
    return ModelInputs(np.array(ids), None, pixels, np.array([[1, 2 * blocks, 2 * blocks]]))


def selector_ms(pipe: Pipeline, inputs: ModelInputs, folder: Path) -> float:
    """Milliseconds in the selector's nodes of a pruned prefill, by ONNX Runtime's profiler; the second run's."""
    stage = pipe.backend.stages[FIRST_LAYER]
    whole, options = stage.session, ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    stage.session = ort.InferenceSession(str(pipe.bundle.folder / stage.entry.file), options)
    try:
        for _ in range(2):
            pipe.generate(inputs, pruning=PruningConfig(KEPT), max_new_tokens=1)
        profile = Path(stage.session.end_profiling())
    finally:
        stage.session = whole
    nodes = [event for event in json.loads(profile.read_text()) if event["name"].endswith("_kernel_time")]
    profile.unlink()
    second = nodes[len(nodes) // 2 :]
    return sum(event["dur"] for event in second if event["name"].startswith(_SELECTOR_NODES)) / 1e3


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/claims"), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--side", type=int, default=1008, help="of the image, in pixels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the language model (default: %(default)s)")
    args = parser.parse_args()
    checkpoint, bundle = make_model(
        args.out / f"{args.layers}-layers", cut_config("qwen2.5-vl-7b", args.layers, vision_layers=1)
    )
    torch.set_num_threads(torch.get_num_threads())
    with Pipeline.load(bundle, vision_cache_mb=0, threads=torch.get_num_threads()) as pipe:
        inputs = noise_prompt(pipe, args.side)
        heads = pipe.bundle.manifest.head_weights.values
        theirs = TorchStages(checkpoint, heads, prompt_tokens(pipe.bundle))
        found = interleave(
            {
                "hawk_trt, all": lambda: run_ours(pipe, inputs, 1.0, 32),
                "transformers, all": lambda: theirs.run(inputs, 1.0, 32),
                "hawk_trt, 20 %": lambda: run_ours(pipe, inputs, KEPT, 32),
                "transformers, 20 %": lambda: theirs.run(inputs, KEPT, 32),
            },
            args.rounds,
            step=lambda: print(".", end="", file=sys.stderr, flush=True),
        )
        ours, theirs_all, pruned, theirs_pruned = found.values()
        if {one.token_ids for one in ours + theirs_all} != {ours[0].token_ids}:
            print("answers differ, so times cannot be compared", file=sys.stderr)
            return 1
        selector = selector_ms(pipe, inputs, args.out)
        kv_bytes = pipe.bundle.manifest.cache_bytes(pruned[0].num_kept_total)
    with Pipeline.load(bundle, threads=torch.get_num_threads()) as pipe:
        visions = [pipe.generate(inputs, max_new_tokens=1).timings.vision for _ in range(2)]

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {load()}; {args.side} x {args.side} px, "
        f"{args.layers} layers, medians of {args.rounds} interleaved rounds, ms"
    )
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("onnxruntime", "torch", "transformers")))
    print(f"{'':20s}" + "".join(f"{stage:>13s}" for stage in STAGES))
    for name, times in found.items():
        print(f"{name:20s}" + "".join(f"{getattr(median(times), stage):13.1f}" for stage in STAGES))
    claims = [
        ("selector, share of unpruned prefill", selector / median(ours).prefill, MAX_SELECTOR_SHARE, False),
        ("prefill, times faster at 20 %", ratio(ours, pruned, "prefill"), MIN_PREFILL_GAIN, True),
        ("32 tokens end to end, times faster at 20 %", ratio(ours, pruned, "total"), MIN_TOTAL_GAIN, True),
        (
            f"KV bytes at 20 %, share ({kv_bytes} bytes)",
            pruned[0].num_kept_total / ours[0].num_kept_total,
            MAX_KV_SHARE,
            False,
        ),
        ("vision of a known image, share of the first time", visions[1] / visions[0], MAX_KNOWN_VISION_SHARE, False),
        *_against("all", theirs_all, ours),
        *_against("20 %", theirs_pruned, pruned),
    ]
    for name, got, bound, at_least in claims:
        holds = got >= bound if at_least else got <= bound
        word, side = "holds" if holds else "FAILS", "least" if at_least else "most"
        print(f"{word:6s} {name}: {got:.4g}, expected at {side} {bound:g}")
    return int(any((got < bound) if at_least else (got > bound) for _, got, bound, at_least in claims))


def _against(kept: str, theirs: Sequence[Times], ours: Sequence[Times]) -> list[tuple[str, float, float, bool]]:
    """Every stage against transformers."""
    return [
        (f"{stage} against transformers, {kept}, times faster", ratio(theirs, ours, stage), 1.0, True)
        for stage in STAGES
        if stage != "score"
    ]


if __name__ == "__main__":
    sys.exit(main())
