"""The command python -m benchmarks.gpu_report.preflight: where ONNX Runtime's CUDA provider puts each node; no GPU.

In: bundles, or nothing for a small random model of every family in every dtype and quantisation; versions of
onnxruntime-gpu, the oldest and the newest supported unless told otherwise. Out: a row for each graph of the target cuda
and exit 1 where a session cannot be made, a copy between CPU and GPU was added, a node that computes is on the CPU, or
attention in half precision takes another kernel than it should: FlashAttention in language stages, and in vision
stages, whose windows have masks, any that keeps no scores. The provider is the real one, over the stub libraries of
stub_cuda.py: it proves loading, placement and the choice of kernels, neither values nor speed.
Wheels are fetched when first needed, 250 MB each, into build/onnxruntime-gpu.
"""

import argparse
import collections
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_report import stub_cuda
from benchmarks.gpu_report.record import ROOT
from hawk_trt.bundle import Bundle, WeightFormat
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.stages import CUDA, DTYPES, STAGES

if TYPE_CHECKING:
    import onnxruntime as ort

VERSIONS = ("1.28.0", "1.31.1")
# What a graph does with shapes, which the provider computes on the host on purpose. One of these that took data instead
# would cost copies, and those are counted.
_SHAPE_OPERATORS = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Gather", "Max", "Min", "Mod", "Mul"),
    *("Neg", "Range", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where"),
}
_GRAPHED = ("first_layer", "decoder")  # decode steps, which a CUDA graph may hold
# For the words of dynamic dimensions: a prefill of 64 tokens, a frame of 1,008 x 1,008 pixels, 13 tiles.
_SIZES = {"batch": 1, "num_visual": 1, "num_text": 64, "seq_len": 64, "num_kept_total": 64, "cache_len": 256}
_SIZES |= {"num_frames": 1, "num_patches": 72**2, "num_windows": 9**2, "window_len": 8**2}
_SIZES |= {"num_tiles": 13}
# How the provider's log calls the kernels of attention that keep no scores.
_FLASH = "Flash Attention"
_FUSED = (_FLASH, "Memory Efficient Attention")
_TYPES = {"tensor(float)": 1, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_CPU_PROVIDER = "CPUExecutionProvider"
_FAILED = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the nodes of one graph went."""

    graph: str  # its file
    refusal: str | None  # why there is no session, None where there is one
    copies: int  # Memcpy nodes that were added
    on_cpu: dict[str, int]  # nodes on the CPU provider by operator
    # how often each kernel of attention ran in half precision, "unfused" for all that are not known
    attention: dict[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        """What is wrong, None where nothing is."""
        if self.refusal is not None:
            return f"no session: {self.refusal}"
        computing = {name: count for name, count in self.on_cpu.items() if name not in _SHAPE_OPERATORS}
        if self.copies or computing:
            return f"{self.copies} copies, computing on the CPU: {computing or 'nothing'}"
        good = _FUSED if "vision" in self.graph else (_FLASH,)
        slow = {name: count for name, count in self.attention.items() if name not in good}
        return f"attention: {slow}, expected {' or '.join(good)}" if slow else None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 all is placed well, 1 something is not, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    if args.place is not None:
        return _place(args.place)
    failed = 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundles = args.bundles or list(random_bundles(Path(scratch)))
            graphs = [path for bundle in bundles for path in cuda_graphs(bundle)]
            for version in args.versions:
                placements = place(graphs, version)
                wrong = [placement for placement in placements if placement.problem]
                for placement in wrong:
                    print(f"onnxruntime-gpu {version}: {placement.graph}: {placement.problem}")
                shapes = max(sum(placement.on_cpu.values()) for placement in placements)
                good = len(placements) - len(wrong)
                kernels = collections.Counter[str]()
                for placement in placements:
                    kernels.update(placement.attention)
                attention = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
                print(
                    f"onnxruntime-gpu {version}: {good} of {len(placements)} graphs placed well, "
                    f"at most {shapes} shape nodes on the CPU; attention in half precision: {attention}"
                )
                failed += len(wrong)
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    return _FAILED if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report.preflight",
        description="Load the graphs of the target cuda in ONNX Runtime's CUDA provider without a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE", help="none: small models of every family")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="of onnxruntime-gpu")
    parser.add_argument("--place", type=Path, nargs="+", help=argparse.SUPPRESS)  # the process over the stubs
    return parser


def cuda_graphs(bundle: Path) -> list[Path]:
    """The graphs of a bundle's target cuda."""
    loaded = Bundle.load(bundle)
    return [loaded.folder / loaded.manifest.graph(stage, CUDA).file for stage in STAGES]


def place(graphs: list[Path], version: str) -> list[Placement]:
    """Load graphs in a version of onnxruntime-gpu, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_report.preflight", "--place", *map(str, graphs)]
    environment = os.environ | stub_cuda.environment(version) | {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"onnxruntime-gpu {version}: status {done.returncode}: {done.stderr.strip()[-400:]}")
    return [Placement(**row) for row in json.loads(done.stdout)]


def _place(graphs: list[Path]) -> int:
    """The process over the stubs: placements as JSON on stdout."""
    placements = [asdict(_placement(path)) for path in graphs]
    print(json.dumps(placements))
    sys.stdout.flush()
    os._exit(0)  # the stubs do not survive the provider's own clean-up


def _placement(path: Path) -> Placement:
    """Make a session and read where its nodes went from ONNX Runtime's own log, which goes to the streams of C."""
    import onnxruntime as ort

    from hawk_trt.runtime.session import ATTENTION_KERNELS

    options = ort.SessionOptions()
    options.log_severity_level = 0
    settings = {"device_id": "0", "use_tf32": "0", "sdpa_kernel": ATTENTION_KERNELS}
    if path.name.startswith(_GRAPHED):
        settings["enable_cuda_graph"] = "1"
    refusal, half = None, 0
    ort.set_default_logger_severity(0)  # which tells the kernel that attention takes
    with tempfile.TemporaryFile() as log:
        streams = {stream: os.dup(stream) for stream in (1, 2)}
        for stream in streams:
            os.dup2(log.fileno(), stream)
        try:
            providers = [("CUDAExecutionProvider", settings), _CPU_PROVIDER]
            session = ort.InferenceSession(str(path), options, providers=providers)
            if session.get_providers()[0] == _CPU_PROVIDER:
                refusal = "the CUDA provider did not start"
            elif path.name.startswith(STAGES):
                half = _run(session, path)
        except Exception as error:  # ONNX Runtime's errors have no common class, and each is the answer here
            refusal = " ".join(str(error).split())[:300]
        finally:
            ctypes.CDLL(None).fflush(None)
            for stream, kept in streams.items():
                os.dup2(kept, stream)
                os.close(kept)
            ort.set_default_logger_severity(2)
        log.seek(0)
        said = log.read().decode(errors="replace")
    attention = {name: said.count(f"ONNX Attention: using {name}") if half else 0 for name in _FUSED}
    attention[_FLASH] += len(re.findall(r"Operator=GroupQueryAttention .*SdpaKernel=FLASH_ATTENTION", said))
    attention["unfused"] = half - sum(attention.values())
    return Placement("/".join(path.parts[-2:]), refusal, *_placed(said), {k: n for k, n in attention.items() if n})


def _run(session: "ort.InferenceSession", path: Path) -> int:
    """Run a stage; its nodes of attention in half precision."""
    import onnx
    import onnxruntime as ort

    binding, tensors = session.io_binding(), [*session.get_inputs(), *session.get_outputs()]
    half = any("float16" in entry.type for entry in tensors)
    for entry in session.get_inputs():
        shape = [_SIZES[size] if isinstance(size, str) else size for size in entry.shape]
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, _TYPES[entry.type], "cuda", 0)
        binding.bind_ortvalue_input(entry.name, value)
    for entry in session.get_outputs():
        binding.bind_output(entry.name, "cuda", 0)
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    session.run_with_iobinding(binding, options)
    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type in ("Attention", "GroupQueryAttention") for node in nodes) if half else 0


def _placed(log: str) -> tuple[int, dict[str, int]]:
    """Copies that were added, and nodes on the CPU by operator, as a verbose log tells them."""
    copies = sum(int(number) for number in re.findall(r"(\d+) Memcpy nodes? (?:is|are) added", log))
    provider, on_cpu = "", collections.Counter[str]()
    for line in log.splitlines():
        if all_nodes := re.search(r"All nodes placed on \[(\w+)\]\. Number of nodes: (\d+)", line):
            if all_nodes[1] == _CPU_PROVIDER:  # they are not listed then
                on_cpu["every operator"] += int(all_nodes[2])
        elif heading := re.search(r"Node\(s\) placed on \[(\w+)\]", line):
            provider = heading[1]
        elif node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            on_cpu[node[1]] += provider == _CPU_PROVIDER
    return copies, dict(+on_cpu)


def random_bundles(folder: Path) -> Iterator[Path]:
    """A small random model of every family, in every dtype, and quantised; one that CUDA has no kernel for is told."""
    from export.random_checkpoint import random_checkpoint
    from export.writer import ExportOptions, export

    formats: list[tuple[str, str, WeightFormat | None]] = [(dtype, dtype, None) for dtype in DTYPES]
    for bits in (8, 4):
        formats += [(f"int{bits}-{dtype}", dtype, WeightFormat(bits, 64)) for dtype in DTYPES]
    for family, config in small_configs().items():
        for name, dtype, weights in formats:
            source = folder / "checkpoints" / f"{family}-{name}"
            source.mkdir(parents=True)
            out = folder / f"{family}-{name}"
            try:
                options = ExportOptions(dtype, (CUDA,), im_end_token_id=300, vision_end_token_id=301, weights=weights)
            except InvalidInput as error:  # refused by name, as it should be where the provider has no kernel
                if (dtype, weights is None) != ("bfloat16", False):
                    raise
                print(f"{family}-{name}: refused: {error}")
                continue
            export(random_checkpoint(source, config), out, options, name=family)
            yield out


def small_configs() -> dict[str, dict[str, Any]]:
    """config.json of a small model of each family, as transformers writes it."""
    import transformers

    text = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": 300,
        "bos_token_id": None,
    }
    ids = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 301}
    mrope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    qwen = text | {"rope_parameters": mrope}
    # heads of the released sizes: 80, 72 and 64
    tower = {"depth": 2, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 256}
    qwen3 = qwen | {"head_dim": 64, "rope_parameters": mrope | {"mrope_interleaved": True}}
    partial = {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
    hybrid = text | {"head_dim": 64, "num_hidden_layers": 8, "rope_parameters": mrope | partial}
    hybrid |= {f"linear_{name}": size for name, size in linear.items()}
    tile = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    tiles = {"vision_config": tile, "image_token_id": 310, "image_seq_length": 256}
    configs = {
        "Qwen2VL": transformers.Qwen2VLConfig(
            text_config=qwen, vision_config={"depth": 2, "embed_dim": 160, "hidden_size": 256, "num_heads": 2}, **ids
        ),
        "Qwen2_5_VL": transformers.Qwen2_5_VLConfig(
            text_config=qwen, vision_config=tower | {"hidden_size": 160, "fullatt_block_indexes": [1]}, **ids
        ),
        "Qwen3VL": transformers.Qwen3VLConfig(
            text_config=qwen3,
            vision_config=tower
            | {"hidden_size": 144, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
            **ids,
        ),
        "Qwen3_5": transformers.Qwen3_5Config(
            text_config=hybrid, vision_config=tower | {"hidden_size": 144, "num_position_embeddings": 36}, **ids
        ),
        "InternVL": transformers.InternVLConfig(text_config=transformers.Qwen2Config(**text), **tiles),
        "InternVL3_5": transformers.InternVLConfig(text_config=transformers.Qwen3Config(**text, head_dim=32), **tiles),
    }
    return {
        family: json.loads(config.to_json_string(use_diff=False))
        | {
            "eos_token_id": 300,
            "architectures": [f"{family.replace('InternVL3_5', 'InternVL')}ForConditionalGeneration"],
        }
        for family, config in configs.items()
    }


if __name__ == "__main__":
    sys.exit(main())
