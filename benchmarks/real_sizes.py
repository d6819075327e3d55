"""Models of real size on a machine without their weights: `make check-models`.

Two things that the ordinary tests leave out. 32B and 72B, in sparse files of their real shapes, are exported by linking
(a copy would be 67 and 147 GB). 3B and 7B of the real width, with random weights and so many layers, answer a pruned
prompt about an image in ONNX Runtime on the CPU; scores and kept tokens are compared with the plain form of
hawk_trt/pruning/hawk.py in numpy. Out: a table, and exit 1 where they differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hawk_trt import ModelInputs, Pipeline, PruningConfig
from hawk_trt.bundle import Bundle
from hawk_trt.inputs.layout import collate
from hawk_trt.pruning.hawk import head_scores, num_kept, weighted_topk
from hawk_trt.runtime.trace import traced
from tests.checkpoints import QWEN_MODELS, make_sparse_checkpoint

ROOT = Path(__file__).parent.parent
RELEASED = ROOT / "hawk_trt" / "data" / "head_weights" / "qwen2.5-vl-7b.json"
SHARDS = {"3B": 2, "7B": 5, "32B": 18, "72B": 38}
MAX_SCORE_ERROR = 1e-4
SIDE = 448
_LAYER = "language_model.layers.0"


def link(name: str, folder: Path) -> dict[str, float]:
    """Export sparse files of a model's shapes with --link."""
    checkpoint = make_sparse_checkpoint(folder / name, QWEN_MODELS[name], shards=SHARDS[name], tied=name == "3B")
    started = time.perf_counter()
    command = [sys.executable, "-m", "export", str(checkpoint), "--out", str(folder / f"{name}-bundle")]
    subprocess.run([*command, "--dtype", "bfloat16", "--link"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    bundle = Bundle.load(folder / f"{name}-bundle")
    sizes = {file: entry.size_bytes for file, entry in bundle.manifest.files.items()}
    weights = sum(size for file, size in sizes.items() if bundle.manifest.files[file].weights)
    return {"export_s": seconds, "weights_gb": weights / 1e9, "own_mb": (sum(sizes.values()) - weights) / 1e6}


def run(name: str, layers: int, folder: Path) -> dict[str, float]:
    """Answer a pruned prompt in a process of its own, with random weights of the real width."""
    bundle = folder / f"{name}-width"
    command = [sys.executable, "-m", "export", "--shape", f"qwen2.5-vl-{name.lower()}", "--layers", str(layers)]
    command += ["--vision-layers", "2", "--target", "cpu", "--out", str(bundle)]
    if name == "7B":  # a cut model is not the one they were released for, so they are not its default
        command += ["--head-weights", str(RELEASED)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "benchmarks.real_sizes", "--bundle", str(bundle)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def answer(folder: Path, keep_ratio: float = 0.2) -> dict[str, float]:
    """The pipeline's scores and choice against the oracle's."""
    pipe = Pipeline.load(folder)
    manifest = pipe.bundle.manifest
    special, language = manifest.special_tokens, manifest.language
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    patches = pipe.family.images_to_patches([image], pipe.family.image_settings({}))
    num_visual = int(manifest.vision.tokens_per_item(patches.grid_thw).sum())
    text = np.random.default_rng(1).integers(1000, 100_000, 24).tolist()
    ids = [*text[:8], special.vision_start, *[special.image] * num_visual, special.vision_end, *text[8:]]
    inputs = ModelInputs(input_ids=ids, pixel_values=np.asarray(patches.pixel_values), image_grid_thw=patches.grid_thw)
    pruning = PruningConfig(keep_ratio)
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=4, ignore_eos=True, return_logits=True)
    trace = traced(pipe, inputs, pruning, result.token_ids[:-1])
    layout = pipe.processor.layout(inputs)
    kept = num_kept(num_visual, keep_ratio, pruning.min_visual_tokens)
    weights = np.array(manifest.head_weights.values, np.float32)
    host = collate([layout], [kept], [None], weights)
    embeds = np.array(pipe.bundle.embedding_table()[layout.input_ids], np.float32)
    embeds[layout.visual_rows >= 0] = trace.visual_embeds
    graph = ir.load(folder / manifest.graph("first_layer", "cpu").file).graph

    def tensor(part: str) -> np.ndarray:
        value = graph.initializers[f"{_LAYER}.{part}"].const_value
        assert value is not None  # every initializer has its place in a file
        return value.numpy()

    projections = [
        (tensor(f"self_attn.{letter}_proj.weight"), tensor(f"self_attn.{letter}_proj.bias")) for letter in "qk"
    ]
    norm = tensor("input_layernorm.weight")
    heads = (language.num_attention_heads, language.num_key_value_heads)
    raw = head_scores(embeds, layout.query_weights, norm, language.rms_norm_eps, *projections, *heads)
    chosen, scores = weighted_topk(
        raw[None], weights, host.source_rows, host.select_bias, host.num_kept_total, manifest.normalization
    )
    expected = scores[0][layout.visual_rows >= 0]
    error = float(np.abs(result.scores - expected).max() / np.ptp(expected))
    differing = len(np.setxor1d(result.kept_indices, chosen[0]))
    assert result.logits is not None
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return {
        "layers": language.num_hidden_layers,
        "visual": num_visual,
        "kept": result.num_kept,
        "score_error": error,
        "differing": differing,
        "finite": float(np.isfinite(result.logits).all()),
        "peak_gb": peak_kb * 1024 / 1e9,
        "prefill_s": result.timings.vision + result.timings.first_layer + result.timings.decoder,
        "step_s": result.timings.decode / 3,
    }


def main() -> int:
    """Print one line a model; returns 1 where the pipeline and the oracle differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", nargs="*", choices=QWEN_MODELS, default=["32B", "72B"], help="default: 32B 72B")
    parser.add_argument("--run", nargs="*", choices=QWEN_MODELS, default=["3B", "7B"], help="default: 3B 7B")
    parser.add_argument("--layers", type=int, default=2, help="of the models that run (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("artifacts"), help="where the files go for the time being")
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)  # how this program calls itself
    args = parser.parse_args()
    if args.bundle is not None:
        print(json.dumps(answer(args.bundle)))
        return 0
    args.dir.mkdir(parents=True, exist_ok=True)
    good = True
    for kind, names in (("link", args.link), ("run", args.run)):
        for name in names:
            with tempfile.TemporaryDirectory(prefix="real-", dir=args.dir) as folder:
                path = Path(folder).resolve()
                result = link(name, path) if kind == "link" else run(name, args.layers, path)
            print(f"{kind} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()), flush=True)
            if kind == "run":
                good &= result["score_error"] < MAX_SCORE_ERROR and not result["differing"] and result["finite"] == 1
    print("equal to the oracle" if good else "differs from the oracle", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
