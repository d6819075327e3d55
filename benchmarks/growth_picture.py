"""The picture of benchmarks/growth.py: a column for each size that grows, time above memory, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

if TYPE_CHECKING:
    from benchmarks.growth import Point

_LABELS = {
    "prompt": "tokens of the prompt",
    "images": "images of 256 tokens",
    "output": "tokens of the answer",
    "cache": "columns of the cache, 300 used",
}


def draw(found: "Mapping[tuple[str, str], Sequence[Point]]", path: Path) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panes = figure.subplots(2, len(_LABELS), sharex="col", sharey="row")
    for column, (axis, label) in enumerate(_LABELS.items()):
        time, memory = panes[:, column]
        for row in (row for (own_axis, _), row in found.items() if own_axis == axis):
            sizes = [point.size for point in row]
            time.plot(sizes, [point.cpu_ms for point in row], "o-", ms=4, label=row[0].series)
            memory.plot(sizes, [point.peak_mb for point in row], "o-", ms=4)
            # through the last point: where time would be, were it linear
            time.plot([sizes[0], sizes[-1]], [row[-1].cpu_ms * sizes[0] / sizes[-1], row[-1].cpu_ms], "k:", lw=0.8)
        time.plot([], [], "k:", lw=0.8, label="linear")
        time.legend(fontsize=8)
        memory.set_xlabel(label)
        for pane in (time, memory):
            pane.set_xscale("log", base=2)
            pane.set_yscale("log")
            pane.grid(alpha=0.3)
            pane.xaxis.set_major_formatter("{x:,.0f}")
            pane.yaxis.set_major_formatter("{x:,g}")
            pane.yaxis.set_minor_formatter(NullFormatter())
    panes[0, 0].set_ylabel("CPU time of a request, ms")
    panes[0, -1].set_title("here of one decode step", fontsize=9)
    panes[1, 0].set_ylabel("peak resident memory (VmHWM), MB")
    panes[1, 0].set_ylim(bottom=100)
    figure.savefig(path, dpi=110)
