"""What TensorRT says when it refuses a graph, as one message that a person can act on.

In: the parser's errors, or the lines logged while a plan was built. Out: the stage, the node by its name in the
graph, the reason, and what helps where that is known.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .prepare import PLUGIN_OP

_REASONS_SHOWN = 3
_REASON_CHARACTERS = 400
# Ops of opset 24 that parsers before 10.15 do not know.
_OPSET_24_OPS = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
# A shape that contradicts a limit only warns at build; the engine then fails when it is run with it.
_FATAL_WARNINGS = ("not self-consistent",)
_MEMORY_WORDS = ("out of memory", "outofmemory", "insufficient memory", "cudaerrormemoryallocation", "std::bad_alloc")
# "[graph.cpp::compute::12] ", and "IBuilder::build: Error Code 4: " behind it
_SOURCE_LINE = re.compile(r"\[?\b[\w./]+\.(?:cpp|h|cu)(?:::\w+)*(?:[:\s]*(?:line )?\d+)?\]?:?\s*")
_ERROR_CODE = re.compile(r"^(?:\w+::\w+: )?Error Code \d+: ")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of TensorRT's log; severity by its name, such as "ERROR"."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the build failed, or would fail when run, because of it."""
        return "ERROR" in self.severity or any(words in self.text for words in _FATAL_WARNINGS)


@dataclass(frozen=True, slots=True)
class ParserFault:
    """One error of the parser: the node's name and op type (empty where it is no node's), and the reason."""

    node: str
    op_type: str
    reason: str


def parser_message(file: str, tensorrt: str, faults: Sequence[ParserFault], log: Iterable[LogLine]) -> str:
    """Why a graph was not parsed; the log tells where the parser gives no fault."""
    reasons = []
    for fault in faults:
        op_type = f" ({fault.op_type})" if fault.op_type else ""
        reasons.append((f"Node {fault.node}{op_type}: " if fault.node else "") + _plain(fault.reason))
    reasons = reasons or [_plain(line.text) for line in log if line.is_error]
    ops = {fault.op_type for fault in faults}
    advice = ""
    if ops & _OPSET_24_OPS:
        advice = " Use the target portable, which has none of these ops: --target portable"
    elif PLUGIN_OP in ops:
        advice = (
            " The plugin was asked for and TensorRT does not find it: build it for this TensorRT (make plugin), "
            "or build without it (--plugin none)"
        )
    return f"{file}: TensorRT {tensorrt} cannot parse it. {_shown(reasons)}{advice}"


def builder_message(file: str, tensorrt: str, log: Iterable[LogLine], node_names: Iterable[str]) -> str:
    """Why no plan came out, or one that must not be used; node_names: of the graph, to find the one that is meant."""
    lines = [line.text for line in log if line.is_error]
    text = " ".join(lines)
    # the longest first: "self_attn/q" is part of "self_attn/q_proj"
    node = next((name for name in sorted(node_names, key=len, reverse=True) if len(name) > 1 and name in text), None)
    where = f" Node {node}:" if node else ""
    advice = ""
    if any(word in text.lower() for word in _MEMORY_WORDS):
        advice = (
            " Free memory (close other programs; on a Jetson also the desktop), or make the engines smaller: "
            "--max-visual-tokens, --max-prompt-tokens, --max-context, --batch, --workspace-gib"
        )
    return f"{file}: TensorRT {tensorrt} cannot build it.{where} {_shown([_plain(line) for line in lines])}{advice}"


def _plain(text: str) -> str:
    """The reason without TensorRT's error code and source line."""
    short = " ".join(_ERROR_CODE.sub("", _SOURCE_LINE.sub("", text).strip()).split())
    return short[:_REASON_CHARACTERS] + ("..." if len(short) > _REASON_CHARACTERS else "")


def _shown(reasons: Sequence[str]) -> str:
    """The first reasons, each once."""
    unique = list(dict.fromkeys(reason for reason in reasons if reason)) or ["TensorRT gave no reason"]
    more = f" (and {len(unique) - _REASONS_SHOWN} more)" if len(unique) > _REASONS_SHOWN else ""
    return "; ".join(reason.rstrip(".") for reason in unique[:_REASONS_SHOWN]) + more + "."
