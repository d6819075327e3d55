"""Known miscompiles of TensorRT, and the compiler switches that avoid them: all in this one table.

TensorRT reads the switches from the environment variable __LUNOWUD. They are not documented by NVIDIA; they were
found, with these versions and symptoms, by the users and in the sources of TensorRT-Edge-LLM, which sets them too.
What a switch costs was under 5 % of a decode step there. HAWK_NO_WORKAROUNDS=1 leaves all off, to see whether a
newer TensorRT still needs them; the check after each build tells.

| name                   | versions      | where   | symptom without it                                             |
| ---------------------- | ------------- | ------- | -------------------------------------------------------------- |
| no_dual_gemm           | 10.13, 10.14  | always  | gate_proj and up_proj matched as one product, wrong values     |
| no_horizontal_fusion   | 10.13 and up  | batch 1 | fluent nonsense in float16: gate_proj, up_proj fused wrongly   |
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hawk_trt.runtime.versions import at_least, up_to

_VARIABLE = "__LUNOWUD"
_NONE = "HAWK_NO_WORKAROUNDS"


class Workaround(NamedTuple):
    """A switch, by the name that engines.json has for it, and which versions and largest batch need it (None: all)."""

    name: str
    switch: str
    since: str
    until: str | None
    max_batch: int | None


WORKAROUNDS = (
    Workaround("no_dual_gemm", "-peep:match_dual_gemm=off", "10.13", "10.14", None),
    Workaround("no_horizontal_fusion", "-peep:fc_h_fusion=off", "10.13", None, 1),
)


def workarounds_for(tensorrt: str, batch: int) -> tuple[Workaround, ...]:
    """The workarounds that a version needs for engines of a batch size."""
    if os.environ.get(_NONE, "0") not in ("", "0"):
        return ()
    return tuple(
        entry
        for entry in WORKAROUNDS
        if at_least(tensorrt, entry.since)
        and (entry.until is None or up_to(tensorrt, entry.until))
        and (entry.max_batch is None or batch <= entry.max_batch)
    )


@contextmanager
def applied(workarounds: Iterable[Workaround]) -> Iterator[None]:
    """Set the switches while a builder lives, beside those that the user has set."""
    before = os.environ.get(_VARIABLE)
    given = (before or "").split()
    switches = [*given, *(entry.switch for entry in workarounds if entry.switch not in given)]
    if switches:
        os.environ[_VARIABLE] = " ".join(switches)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before
