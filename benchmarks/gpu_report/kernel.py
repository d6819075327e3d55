"""The top-k kernel and the plugin's enqueue(): every answer against the oracle, then time beside PyTorch's operations.

In: what `make plugin` and `make plugin-check` built; without the first the kernel alone is compiled here. A rehearsal
takes the kernel compiled for the CPU, and the CPU's clock. "graph" is a captured CUDA graph of many calls, so the time
of one on the device; "eager" includes what the host takes to launch. The inputs stay in the GPU's cache, as behind the
product that makes them.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_report.record import ROOT, Failed, Record, Setting
from benchmarks.gpu_report.topk_cases import Case, disagreement, random_case
from benchmarks.gpu_report.topk_library import Addresses, KernelLibrary, PluginLibrary, Sizes, TopK
from hawk_trt.errors import BackendError
from hawk_trt.stages import BIAS_KEEP, NORMALIZATIONS

HEADS = 28
KEEP_RATIO = 0.2
_CHECKED_LENGTHS = (1, 2, 31, 256, 257, 512, 513, 1300, 4096, 16_384, 16_385, 32_769, 65_536)
_REHEARSED = 11  # of them: a CPU takes minutes for each of the others
_CHECKED_BATCHES = (Sizes(4, 16, 700, 140), Sizes(3, 1, 5000, 999), Sizes(8, 40, 257, 100))
_TIMED_LENGTHS = (1, 300, 1296, 4096, 16_384)
_CALLS_IN_A_ROW = 50
_REPEATS = {"cuda": 15, "cpu": 3}
_BUILT = ROOT / "build" / "plugins"
_CHECKED = ROOT / "build" / "plugin-check"


class Gpu:
    """Streams, graphs and the clock of a GPU, by way of PyTorch."""

    device = "cuda"
    modes = ("graph", "eager")

    def stream(self) -> int:
        """Handle of PyTorch's current stream."""
        return torch.cuda.current_stream().cuda_stream

    def run_aside(self, call: Callable[[], object]) -> None:
        """Run a call on a stream of its own, to its end."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """What replays a call from a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay(held: torch.cuda.CUDAGraph = graph) -> None:
            held.replay()

        return replay

    def synchronize(self) -> None:
        """Wait for all enqueued work."""
        torch.cuda.synchronize()

    def microseconds(self, run: Callable[[], object]) -> float:
        """Time of a run on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


class Host:
    """The same of a CPU, for a rehearsal: there is no stream and no graph."""

    device = "cpu"
    modes = ("eager",)

    def stream(self) -> int:
        """The seed of the emulation's schedule."""
        return 1

    def run_aside(self, call: Callable[[], object]) -> None:
        """Run a call."""
        call()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call itself."""
        return call

    def synchronize(self) -> None:
        """Nothing is pending."""

    def microseconds(self, run: Callable[[], object]) -> float:
        """Time of a run."""
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e6


class Buffers:
    """The tensors of a case on a machine."""

    def __init__(self, case: Case, library: TopK, on: Gpu | Host) -> None:
        self.sizes, self._library, self._on = case.sizes, library, on
        given = (case.head_scores, case.head_weights, case.visual_rows, case.select_bias)
        self._inputs = [torch.from_numpy(np.ascontiguousarray(array)).to(on.device) for array in given]
        batch, _, seq_len = case.head_scores.shape
        self.kept_indices = torch.empty((batch, case.num_kept), dtype=torch.int32, device=on.device)
        self.scores = torch.empty((batch, seq_len), device=on.device)
        size = max(library.workspace_bytes(case.sizes), 1)
        self._workspace = torch.full((size,), 255, dtype=torch.uint8, device=on.device)
        self.forget()

    def forget(self) -> None:
        """Put garbage where the answer goes."""
        self.kept_indices.fill_(-1)
        self.scores.fill_(float("nan"))

    def enqueue(self) -> None:
        """Enqueue a call of the library on the current stream."""
        addresses = Addresses(*(tensor.data_ptr() for tensor in (*self._inputs, self.kept_indices, self.scores)))
        self._library.enqueue(addresses, self.sizes, self._workspace.data_ptr(), self._on.stream())

    def enqueue_torch(self) -> torch.Tensor:
        """The same rule, L2, as the PyTorch operations that a call replaces; their ties may fall otherwise."""
        head_scores, head_weights, visual_rows, select_bias = self._inputs
        visual = visual_rows >= 0
        raw = torch.where(visual[:, None, :] & torch.isfinite(head_scores), head_scores, 0.0)
        norm = torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp_min(1e-12)
        scores = torch.where(visual, torch.matmul(head_weights, raw / norm), 0.0)
        keys = torch.where(select_bias.abs() >= BIAS_KEEP, select_bias, scores + select_bias)
        best = torch.topk(keys, self.sizes.num_kept, sorted=False).indices
        return torch.sort(best.int()).values


def kernel(record: Record, setting: Setting) -> None:
    """Check every case of every normalization, then time each length."""
    on: Gpu | Host = Host() if setting.rehearse else Gpu()
    found = {normalization: libraries(normalization, setting, record) for normalization in NORMALIZATIONS}
    failures, cases = [], 0
    lengths = _CHECKED_LENGTHS[2:3] if setting.small else _CHECKED_LENGTHS[: _REHEARSED if setting.rehearse else None]
    for normalization, by_name in found.items():
        for name, library in by_name.items():
            for case in _cases(lengths, _CHECKED_BATCHES[:1] if setting.small else _CHECKED_BATCHES):
                cases += 1
                if (wrong := _check(library, case, normalization, on)) is not None:
                    failures.append(f"{name} {normalization} {case.sizes}: {wrong}")
        record.put(cases=cases, failures=failures, checked=[*by_name])
    for seq_len in _TIMED_LENGTHS[:2] if setting.small else _TIMED_LENGTHS:
        for row in _time(found["l2"], seq_len, on, _CALLS_IN_A_ROW if isinstance(on, Gpu) else 1):
            record.row("timings", **row)
    if failures:
        raise Failed(f"{len(failures)} of {cases} cases: {failures[0]}")


def libraries(normalization: str, setting: Setting, record: Record) -> dict[str, TopK]:
    """What can be checked here: the kernel, and the plugin where it was built."""
    if setting.rehearse:
        sys.path.insert(0, str(ROOT / "tests" / "plugins"))
        from on_cpu import compile_for_cpu

        return {"kernel": KernelLibrary(compile_for_cpu(ROOT / "build" / "plugins-on-cpu"), normalization)}
    library = _BUILT / "libhawk_topk.so"
    found: dict[str, TopK] = {
        "kernel": KernelLibrary(library if library.is_file() else _build(setting.work / "kernel"), normalization)
    }
    harness = next(iter(sorted(_CHECKED.glob("*/libhawk_plugin_harness.so"), reverse=True)), None)
    if harness is not None:
        found["enqueue"] = PluginLibrary(harness.with_name("libhawk_trt_plugin.so"), harness, normalization)
    else:
        record.put(plugin="not checked: make plugin-check TENSORRT_ROOT=... builds what calls its enqueue()")
    return found


def _build(folder: Path) -> Path:
    """The kernel alone, compiled for the GPU of this machine."""
    options = ["-DHAWK_PLUGIN=OFF", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    for command in (
        ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), *options],
        ["cmake", "--build", str(folder)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BackendError("cmake: not found. pip install cmake, or build elsewhere: make plugin") from None
        if done.returncode != 0:
            raise BackendError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return folder / "libhawk_topk.so"


def _cases(lengths: tuple[int, ...], batches: tuple[Sizes, ...]) -> Iterator[Case]:
    """Lengths around each boundary, every K that is special, ties, NaN, batches."""
    for seq_len in lengths:
        for num_kept in sorted({1, max(1, seq_len // 5), max(1, seq_len - 1), seq_len}):
            for ties in (False, True):
                yield random_case(num_kept, Sizes(1, HEADS, seq_len, num_kept), ties=ties, broken=ties)
    for seed, sizes in enumerate(batches):
        yield random_case(seed, sizes, ties=True, broken=True, small_bias=True)


def _check(library: TopK, case: Case, normalization: str, on: Gpu | Host) -> str | None:
    """Run a case once eagerly and twice from a captured graph; what is wrong with an answer, or None."""
    buffers = Buffers(case, library, on)
    on.run_aside(buffers.enqueue)
    kept, scores = buffers.kept_indices.cpu().clone(), buffers.scores.cpu().clone()
    wrong = disagreement(case, normalization, kept.numpy(), scores.numpy())
    if wrong is not None:
        return wrong
    replay = on.capture(buffers.enqueue)
    for number in range(2):
        buffers.forget()
        replay()
        on.synchronize()
        if not torch.equal(kept, buffers.kept_indices.cpu()) or not torch.equal(scores, buffers.scores.cpu()):
            return f"replay {number} of its graph gave other bits"
    return None


def _time(by_name: dict[str, TopK], seq_len: int, on: Gpu | Host, calls: int) -> Iterator[dict[str, object]]:
    """A call of each library beside PyTorch's operations, the median over repeats, in turn."""
    num_kept = max(1, int(np.ceil(seq_len * KEEP_RATIO)))
    case = random_case(0, Sizes(1, HEADS, seq_len, num_kept))
    case.visual_rows[:] = np.arange(seq_len)
    case.select_bias[:] = 0
    for name, library in by_name.items():
        buffers = Buffers(case, library, on)
        for mode in on.modes:
            runs = [partial(_in_a_row, call, calls) for call in (buffers.enqueue, buffers.enqueue_torch)]
            for run in runs:
                on.run_aside(run)
            if mode == "graph":
                runs = [on.capture(run) for run in runs]
            measured = [[on.microseconds(run) / calls for run in runs] for _ in range(_REPEATS[on.device])]
            ours, theirs = (statistics.median(times) for times in zip(*measured, strict=True))
            yield {
                "positions": seq_len,
                "kept": num_kept,
                "what": name,
                "mode": mode,
                "ours_us": round(ours, 2),
                "torch_us": round(theirs, 2),
            }


def _in_a_row(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
