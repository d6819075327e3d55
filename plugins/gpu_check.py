"""The command python -m plugins.gpu_check: the kernel and the plugin's enqueue() on this GPU, checked, then timed.

In: what make plugin built; PyTorch with CUDA, for memory, streams, graphs and the operations to compare with. No
TensorRT. Out: whether every answer is the oracle's, eager and replayed from a CUDA graph, and the time of a call beside
that of the PyTorch operations that it replaces, as a table or JSON.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hawk_trt.apps.cli.output import print_json
from hawk_trt.errors import BackendError, HawkError
from hawk_trt.stages import NORMALIZATIONS

from .cases import Case, disagreement, random_case
from .gpu_buffers import Buffers
from .gpu_timing import HEADS, KEEP_RATIO, Timing, measure
from .kernel_library import KernelLibrary, PluginLibrary, Sizes, TopK

_CHECKED_LENGTHS = (1, 2, 31, 256, 257, 512, 513, 1300, 4096, 16_384, 16_385, 32_769, 65_536)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found on which machine."""

    gpu: str
    compute_capability: str
    torch: str
    cuda: str
    python: str
    checked: tuple[str, ...]
    cases: int
    failures: tuple[str, ...]
    timings: tuple[Timing, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 all answers right, 1 one was not, 2 wrong usage."""
    args = _parser().parse_args(arguments)
    try:
        report = _run(args)
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print_json(report)
    else:
        _print(report, Console())
    return 1 if report.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m plugins.gpu_check",
        description="Check the top-k kernel and the plugin's enqueue() on this GPU, and time them beside PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--build", type=Path, default=Path("build/plugins"), help="folder that make plugin wrote")
    parser.add_argument(
        "--kernel-only", action="store_true", help="leave out enqueue(), which needs TensorRT's headers"
    )
    parser.add_argument("--no-timing", action="store_true", help="check the answers only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _run(args: argparse.Namespace) -> Report:
    if not torch.cuda.is_available():
        raise BackendError("PyTorch sees no CUDA device. gpu_check needs an NVIDIA GPU and a PyTorch built for CUDA")

    def libraries(normalization: str) -> dict[str, TopK]:
        found: dict[str, TopK] = {"kernel": KernelLibrary(args.build / "libhawk_topk.so", normalization)}
        if not args.kernel_only:
            plugin, harness = (args.build / f"libhawk_{name}.so" for name in ("trt_plugin", "plugin_harness"))
            found["enqueue"] = PluginLibrary(plugin, harness, normalization)
        return found

    by_normalization = {name: libraries(name) for name in NORMALIZATIONS}
    cases, failures = 0, []
    for normalization, found in by_normalization.items():
        for what, library in found.items():
            for case in check_cases():
                cases += 1
                wrong = check(library, case, normalization)
                if wrong is not None:
                    failures.append(f"{what} {normalization} {case.sizes}: {wrong}")
        print(f"checked {normalization}: {len(failures)} wrong so far, of {cases}", file=sys.stderr)
    timings = () if args.no_timing else tuple(measure(by_normalization["l2"]))
    major, minor = torch.cuda.get_device_capability()
    return Report(
        torch.cuda.get_device_name(),
        f"{major}.{minor}",
        torch.__version__,
        str(torch.version.cuda),
        platform.python_version(),
        tuple(by_normalization["l2"]),
        cases,
        tuple(failures),
        timings,
    )


def check_cases() -> Iterator[Case]:
    """The cases of every normalization: lengths around each boundary, every K that is special, ties, NaN, batches."""
    for seq_len in _CHECKED_LENGTHS:
        for num_kept in sorted({1, max(1, seq_len // 5), max(1, seq_len - 1), seq_len}):
            for ties in (False, True):
                yield random_case(num_kept, Sizes(1, HEADS, seq_len, num_kept), ties=ties, broken=ties)
    for seed, sizes in enumerate((Sizes(4, 16, 700, 140), Sizes(3, 1, 5000, 999), Sizes(8, 40, 257, 100))):
        yield random_case(seed, sizes, ties=True, broken=True, small_bias=True)


def check(library: TopK, case: Case, normalization: str) -> str | None:
    """Run a case once eagerly and twice from a captured graph; what is wrong with an answer, or None."""
    buffers = Buffers(case, library)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        buffers.enqueue(library)
    stream.synchronize()
    kept, scores = buffers.kept_indices.cpu(), buffers.scores.cpu()
    wrong = disagreement(case, normalization, kept.numpy(), scores.numpy())
    if wrong is not None:
        return wrong
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.enqueue(library)
    for replay in range(2):
        buffers.forget()
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(kept, buffers.kept_indices.cpu()) or not torch.equal(scores, buffers.scores.cpu()):
            return f"replay {replay} of its graph gave other bits"
    return None


def _print(report: Report, console: Console) -> None:
    console.print(
        f"{report.gpu}, compute capability {report.compute_capability}, PyTorch {report.torch}, CUDA {report.cuda}",
        highlight=False,
    )
    for failure in report.failures:
        console.print(f"WRONG {failure}", style="red", markup=False, soft_wrap=True)
    good = report.cases - len(report.failures)
    console.print(f"right: {good} of {report.cases} cases ({', '.join(report.checked)})", highlight=False)
    if not report.timings:
        return
    table = Table(title=f"L2, {HEADS} heads, one row, {KEEP_RATIO:.0%} kept; microseconds a call")
    for name in ("positions", "kept", "what", "mode", "ours", "PyTorch", "PyTorch / ours"):
        table.add_column(name, justify="left" if name in ("what", "mode") else "right")
    for row in report.timings:
        table.add_row(
            f"{row.seq_len:,}",
            f"{row.num_kept:,}",
            row.what,
            row.mode,
            f"{row.microseconds:.1f}",
            f"{row.torch_microseconds:.1f}",
            f"{row.ratio:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
