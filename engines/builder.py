"""One prepared graph becomes one plan. The only file of the builder that imports TensorRT, 10.3 to 11.x.

In: a PreparedGraph and its optimization profiles. Out: the serialized plan and what went into it. Everything is
strongly typed: dtypes are those of the graph. No enum number is ever stored, since TensorRT 11 renumbered them.
"""

import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, SupportsInt

import tensorrt as trt

from hawk_trt.engine_folder import InputRange
from hawk_trt.errors import BackendError
from hawk_trt.files.staging import write_atomically
from hawk_trt.runtime.tensorrt.engine import load_plugin

from .build_plan import BuildSettings, BuiltPlan
from .messages import LogLine, ParserFault, builder_message, parser_message
from .prepare import PreparedGraph
from .workarounds import applied

TENSORRT_VERSION: str = trt.__version__
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
    """Tells how far a build is, and stops it at its next step once `interrupted` is set."""

    def __init__(self, show: Callable[[float, float], None] | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self.interrupted = False
        self._show = show
        self._phases: dict[str, tuple[int, int]] = {}  # under way, each inside the one before: steps done, steps in all

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        """TensorRT's callback: a phase begins, maybe inside another."""
        del parent_phase
        self._phases[phase_name] = (0, max(int(num_steps), 1))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """TensorRT's callback; False stops the build."""
        if phase_name in self._phases:
            self._phases[phase_name] = (int(step) + 1, self._phases[phase_name][1])
        share = 0.0
        for done, total in reversed(self._phases.values()):
            share = min((done + share) / total, 1.0)
        if self._show is not None:
            self._show(round(100 * share), 100)
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        self._phases.pop(phase_name, None)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Let an interrupt end the build at its next step instead of tearing TensorRT down in the middle."""
        del number, frame
        self.interrupted = True


def build_plan(
    graph: PreparedGraph,
    profiles: Sequence[Sequence[InputRange]],
    settings: BuildSettings,
    show: Callable[[float, float], None] | None = None,
) -> BuiltPlan:
    """Parse and build; show: called with how much is done and how much there is in all.

    Raises:
        BackendError: TensorRT cannot parse or build the graph, or left the plugin out.
    """
    started = time.perf_counter()
    log, monitor = Log(verbose=settings.verbose), Monitor(show)
    with applied(settings.workarounds):
        builder = trt.Builder(log)
        if settings.plugin is not None and not load_plugin(settings.plugin):
            raise BackendError(
                f"{settings.plugin}: TensorRT {TENSORRT_VERSION} cannot load it. Build it for this version: make plugin"
            )
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        names = _parse(graph, network, log)
        plugin_layers = sum(network.get_layer(index).type.name in _PLUGIN_LAYERS for index in range(network.num_layers))
        expected = int(settings.plugin is not None and graph.has_topk)
        if plugin_layers != expected:
            raise BackendError(
                f"{graph.file.name}: got {plugin_layers} plugin layers, expected {expected}. "
                "Build the plugin for this TensorRT (make plugin), or build without it (--plugin none)"
            )
        config = builder.create_builder_config()
        _configure(config, settings, log)
        config.progress_monitor = monitor
        for number, ranges in enumerate(profiles):
            profile = builder.create_optimization_profile()
            for entry in ranges:
                profile.set_shape(entry.name, *(trt.Dims(list(shape)) for shape in (entry.min, entry.opt, entry.max)))
            if config.add_optimization_profile(profile) != number:
                raise BackendError(builder_message(graph.file.name, TENSORRT_VERSION, log.lines, names))
        previous = signal.signal(signal.SIGINT, monitor.interrupt)
        try:
            memory = builder.build_serialized_network(network, config)
        finally:
            signal.signal(signal.SIGINT, previous)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if memory is None or any(line.is_error and line.severity == "WARNING" for line in log.lines):
            raise BackendError(builder_message(graph.file.name, TENSORRT_VERSION, log.lines, names))
        cache = None if settings.timing_cache is None else config.get_timing_cache()
        if settings.timing_cache is not None and cache is not None:
            write_atomically(settings.timing_cache, bytes(_buffer(cache.serialize())))
        seconds = time.perf_counter() - started
        flags = sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))
        return BuiltPlan(_buffer(memory), network.num_layers, plugin_layers, tuple(flags), log.scratch_bytes, seconds)


def _parse(graph: PreparedGraph, network: trt.INetworkDefinition, log: Log) -> list[str]:
    """Fill the network; returns the names of its layers."""
    parser = trt.OnnxParser(network, log)
    # the path is the model's file: TensorRT looks for the weights in its folder
    if not parser.parse(graph.content, str(graph.file.resolve())):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        told = [ParserFault(fault.node_name(), fault.node_operator(), fault.desc()) for fault in faults]
        raise BackendError(parser_message(graph.file.name, TENSORRT_VERSION, told, log.lines))
    return [network.get_layer(index).name for index in range(network.num_layers)]


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


def _buffer(memory: trt.IHostMemory) -> memoryview:
    """TensorRT's memory as bytes; it lives as long as the view."""
    untyped: Any = memory  # its types do not tell that it is a buffer
    return memoryview(untyped)
