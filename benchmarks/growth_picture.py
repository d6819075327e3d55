"""The picture of benchmarks/growth.py: a column for each size that grows, time above memory, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    panes = figure.subplots(2, len(_LABELS), sharex="col")
    for column, (axis, label) in enumerate(_LABELS.items()):
        for (own_axis, series), row in found.items():
            if own_axis != axis:
                continue
            sizes = [point.size for point in row]
            panes[0, column].plot(sizes, [point.cpu_ms for point in row], "o-", ms=4, label=series)
            panes[1, column].plot(sizes, [max(point.peak_mb, 0.1) for point in row], "o-", ms=4, label=series)
        for pane in panes[:, column]:
            pane.set_xscale("log", base=2)
            pane.set_yscale("log")
            pane.grid(alpha=0.3)
        _guide(panes[0, column])
        panes[0, column].legend(fontsize=8)
        panes[1, column].set_xlabel(label)
        panes[1, column].xaxis.set_major_formatter("{x:,.0f}")
    panes[0, 0].set_ylabel("CPU time of a request, ms")
    panes[0, 3].set_ylabel("CPU time of a decode step, ms")
    panes[1, 0].set_ylabel("peak memory (VmHWM) above idle, MB")
    figure.savefig(path, dpi=110)


def _guide(pane: "Axes") -> None:
    """A dotted line of slope 1 below the points, to see by what is linear."""
    line = pane.lines[0]
    sizes, times = line.get_xdata(), line.get_ydata()
    pane.plot([sizes[0], sizes[-1]], [times[-1] * sizes[0] / sizes[-1], times[-1]], "k:", lw=0.8, label="linear")
