"""Plots of a summary: accuracy by keep ratio, and accuracy by time with the Pareto front."""

import io
from collections.abc import Sequence
from typing import Any

from hawk_trt.apps.evaluate.summary import Row, pareto_front
from hawk_trt.apps.evaluate.trials import UNPRUNED
from hawk_trt.errors import InvalidInput

_SIZE_INCHES = (7.2, 4.5)
_DOTS_PER_INCH = 150


def plot_rows(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """Draw both plots.

    Args:
        rows: of one evaluation.
        title: of both.

    Returns:
        PNGs by file name.

    Raises:
        InvalidInput: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # an extra that only plots need
    except ImportError as error:
        raise InvalidInput(f"plots need matplotlib ({error}): pip install matplotlib") from error
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row.selector for row in rows))}
    drawn = {}
    for name, draw in (("accuracy_by_keep_ratio", _by_keep_ratio), ("accuracy_by_time", _by_time)):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows, colours)
        axes.set_title(title)
        axes.set_ylabel("accuracy, with its interval of 95 %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DOTS_PER_INCH)
        drawn[f"{name}.png"] = png.getvalue()
    return drawn


def _by_keep_ratio(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:  # noqa: ANN401 - matplotlib's
    for name, colour in colours.items():
        own = sorted((row for row in rows if row.selector == name), key=lambda row: row.keep_ratio)
        if name == UNPRUNED:
            axes.axhline(own[0].accuracy.mean, color=colour, linestyle="--", label=name)
            continue
        axes.errorbar(
            [row.keep_ratio for row in own],
            [row.accuracy.mean for row in own],
            yerr=_bars(own),
            color=colour,
            marker="o",
            capsize=3,
            label=name,
        )
    axes.set_xlabel("keep ratio")


def _by_time(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:  # noqa: ANN401 - matplotlib's
    timed = [row for row in rows if row.latency_ms is not None]
    for name, colour in colours.items():
        own = [row for row in timed if row.selector == name]
        if own:
            axes.errorbar(
                [_total_ms(row) for row in own],
                [row.accuracy.mean for row in own],
                yerr=_bars(own),
                color=colour,
                marker="o",
                linestyle="none",
                capsize=3,
                label=name,
            )
    for row in timed:
        at = (_total_ms(row), row.accuracy.mean)
        axes.annotate(f"{row.keep_ratio:g}", at, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    front = sorted(pareto_front(rows), key=_total_ms)
    axes.plot([_total_ms(row) for row in front], [row.accuracy.mean for row in front], "k:", label="Pareto front")
    axes.set_xlabel("time of an answer, median, ms (the numbers are keep ratios)")


def _total_ms(row: Row) -> float:
    return 0.0 if row.latency_ms is None else row.latency_ms["total"]


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Lengths of the error bars, below and above."""
    return [
        [row.accuracy.mean - row.accuracy.low for row in rows],
        [row.accuracy.high - row.accuracy.mean for row in rows],
    ]
