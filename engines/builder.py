"""One prepared graph becomes one plan. The only file of the builder that imports TensorRT, 10.3 to 11.x.

In: a PreparedGraph and its optimization profiles. Out: the serialized plan and what went into it. Everything is
strongly typed: dtypes are those of the graph. No enum number is ever stored, since TensorRT 11 renumbered them.
"""

import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, SupportsInt

import tensorrt as trt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hawk_trt.engine_folder import InputRange
from hawk_trt.errors import BackendError
from hawk_trt.files import write_atomically

from .build_plan import BuildSettings, BuiltPlan
from .messages import LogLine, ParserFault, builder_message, parser_message
from .prepare import PLUGIN_OP, PreparedGraph
from .workarounds import applied

TENSORRT_VERSION: str = trt.__version__
_PLUGIN = (PLUGIN_OP, "1", "")  # name, version, namespace
# Between two lines where no bar can be drawn.
_PLAIN_SECONDS = 20.0
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+)")
_PLUGIN_LAYERS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")


class Log(trt.ILogger):
    """Keeps warnings and errors for messages, and prints everything where asked to."""

    def __init__(self, *, verbose: bool) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[LogLine] = []
        self.scratch_bytes = 0
        self._verbose = verbose

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """TensorRT's callback; it must not raise."""
        scratch = _SCRATCH.search(msg)
        if scratch:
            self.scratch_bytes = max(self.scratch_bytes, int(scratch[1]))  # of each profile one line
        if severity.name not in ("INFO", "VERBOSE"):
            self.lines.append(LogLine(severity.name, msg))
        if self._verbose:
            print(f"tensorrt {severity.name}: {msg}", file=sys.stderr)


class Monitor(trt.IProgressMonitor):
    """How far a build is, on stderr: bars on a terminal, one plain line now and then elsewhere. A context manager.

    While it is one, an interrupt ends the build at its next step instead of tearing TensorRT down in the middle.
    """

    def __init__(self, name: str) -> None:
        trt.IProgressMonitor.__init__(self)
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.interrupted = False
        self._name = name
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}
        self._printed_at = time.monotonic()

    def __enter__(self) -> "Monitor":
        def interrupt(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.interrupted = True

        self._previous = signal.signal(signal.SIGINT, interrupt)
        print(f"building {self._name}", file=sys.stderr, flush=True)
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        signal.signal(signal.SIGINT, self._previous)

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        """TensorRT's callback: a phase begins, maybe inside another."""
        depth = self._depth[phase_name] = self._depth.get(parent_phase or "", -1) + 1
        if self._bars is not None:
            description = f"{'  ' * depth}{phase_name}" if depth else f"{self._name}: {phase_name}"
            self._tasks[phase_name] = self._bars.add_task(description, total=int(num_steps))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """TensorRT's callback; False stops the build."""
        if self._bars is not None:
            if phase_name in self._tasks:
                self._bars.update(self._tasks[phase_name], completed=int(step) + 1)
        elif time.monotonic() - self._printed_at > _PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            print(f"building {self._name}: {phase_name}, step {int(step) + 1}", file=sys.stderr, flush=True)
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        """TensorRT's callback."""
        self._depth.pop(phase_name, None)
        if self._bars is not None and phase_name in self._tasks:
            self._bars.remove_task(self._tasks.pop(phase_name))


def build_plan(graph: PreparedGraph, profiles: Sequence[Sequence[InputRange]], settings: BuildSettings) -> BuiltPlan:
    """Parse and build.

    Args:
        graph: the prepared graph.
        profiles: optimization profiles, each a range for every input.
        settings: of the run.

    Raises:
        BackendError: TensorRT cannot parse or build the graph, or left the plugin out.
        KeyboardInterrupt: the user stopped the build.
    """
    started = time.perf_counter()
    log = Log(verbose=settings.verbose)
    with applied(settings.workarounds), Monitor(graph.file.name) as monitor:
        builder = trt.Builder(log)
        if settings.plugin is not None:
            _load_plugin(settings.plugin)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        names = _parse(graph, network, log)
        plugin_layers = sum(network.get_layer(index).type.name in _PLUGIN_LAYERS for index in range(network.num_layers))
        _check_plugin(graph, plugin_layers, asked=settings.plugin is not None)
        config = builder.create_builder_config()
        _configure(config, settings, log)
        config.progress_monitor = monitor
        for number, ranges in enumerate(profiles):
            profile = builder.create_optimization_profile()
            for entry in ranges:
                profile.set_shape(entry.name, *(trt.Dims(list(shape)) for shape in (entry.min, entry.opt, entry.max)))
            if config.add_optimization_profile(profile) != number:
                raise BackendError(builder_message(graph.file.name, TENSORRT_VERSION, log.lines, names))
        memory = builder.build_serialized_network(network, config)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if memory is None or any(line.is_error and line.severity == "WARNING" for line in log.lines):
            raise BackendError(builder_message(graph.file.name, TENSORRT_VERSION, log.lines, names))
        _save_timing_cache(config, settings)
        seconds = time.perf_counter() - started
        return BuiltPlan(_buffer(memory), network.num_layers, plugin_layers, _flags(config), log.scratch_bytes, seconds)


def _load_plugin(library: Path) -> None:
    """Register the plugin, once a process."""
    registry = trt.get_plugin_registry()
    if registry.get_creator(*_PLUGIN) is None and registry.load_library(str(library)) is None:
        raise BackendError(
            f"{library}: TensorRT {TENSORRT_VERSION} cannot load it. Build it for this version: make plugin"
        )


def _parse(graph: PreparedGraph, network: trt.INetworkDefinition, log: Log) -> list[str]:
    """Fill the network; returns the names of its layers."""
    parser = trt.OnnxParser(network, log)
    # the path is the model's file: TensorRT looks for the weights in its folder
    if not parser.parse(graph.content, str(graph.file.resolve())):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        told = [ParserFault(fault.node_name(), fault.node_operator(), fault.desc()) for fault in faults]
        raise BackendError(parser_message(graph.file.name, TENSORRT_VERSION, told, log.lines))
    return [network.get_layer(index).name for index in range(network.num_layers)]


def _check_plugin(graph: PreparedGraph, plugin_layers: int, *, asked: bool) -> None:
    """The first layer has exactly one plugin layer where it was asked for; nothing else has any."""
    expected = 1 if asked and graph.has_topk else 0
    if plugin_layers != expected:
        raise BackendError(
            f"{graph.file.name}: got {plugin_layers} plugin layers, expected {expected}. "
            "Build the plugin for this TensorRT (make plugin), or build without it (--plugin none)"
        )


def _configure(config: trt.IBuilderConfig, settings: BuildSettings, log: Log) -> None:
    # on by default, it rounds float32 products to 10 bits: enough to change which tokens are kept
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0  # the decode step is captured as one CUDA graph on one stream
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.timing_cache is not None:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            log.lines.append(LogLine("INFO", f"{settings.timing_cache}: of another GPU or TensorRT, begun anew"))
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_timing_cache(config: trt.IBuilderConfig, settings: BuildSettings) -> None:
    cache = None if settings.timing_cache is None else config.get_timing_cache()
    if settings.timing_cache is not None and cache is not None:
        write_atomically(settings.timing_cache, bytes(_buffer(cache.serialize())))


def _buffer(memory: trt.IHostMemory) -> memoryview:
    """TensorRT's memory as bytes; it lives as long as the view."""
    untyped: Any = memory  # its types do not tell that it is a buffer
    return memoryview(untyped)


def _flags(config: trt.IBuilderConfig) -> tuple[str, ...]:
    return tuple(sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)))
