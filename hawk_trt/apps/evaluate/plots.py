"""Plots of a summary: accuracy by keep ratio, and accuracy by time with the Pareto front."""

import io
from collections.abc import Sequence
from typing import Any

from hawk_trt.apps.evaluate.summary import Row, pareto_front
from hawk_trt.apps.evaluate.trials import UNPRUNED
from hawk_trt.errors import InvalidInput


def plot_rows(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """Draw both plots of one evaluation: PNGs by file name.

    Raises:
        InvalidInput: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # an extra that only plots need
    except ImportError as error:
        raise InvalidInput(f"plots need matplotlib ({error}): pip install matplotlib") from error
    drawn = {}
    for name, draw in (("accuracy_by_keep_ratio", _by_keep_ratio), ("accuracy_by_time", _by_time)):
        figure = Figure(figsize=(7.2, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows)
        axes.set_title(title)
        axes.set_ylabel("accuracy, with its interval of 95 %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        drawn[f"{name}.png"] = png.getvalue()
    return drawn


def _by_keep_ratio(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 - matplotlib's
    for colour, (name, own) in _by_selector(rows).items():
        if name == UNPRUNED:
            axes.axhline(own[0].accuracy.mean, color=colour, linestyle="--", label=name)
            continue
        own.sort(key=lambda row: row.keep_ratio)
        _draw(axes, [row.keep_ratio for row in own], own, color=colour, label=name)
    axes.set_xlabel("keep ratio")


def _by_time(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 - matplotlib's
    for colour, (name, every) in _by_selector(rows).items():
        timed = [(row.total_ms, row) for row in every if row.total_ms is not None]
        if timed:
            _draw(
                axes, [time for time, _ in timed], [row for _, row in timed], color=colour, label=name, linestyle="none"
            )
        for time, row in timed:
            at = (time, row.accuracy.mean)
            axes.annotate(f"{row.keep_ratio:g}", at, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    front = sorted((row.total_ms or 0.0, row.accuracy.mean) for row in pareto_front(rows))
    axes.plot([time for time, _ in front], [accuracy for _, accuracy in front], "k:", label="Pareto front")
    axes.set_xlabel("time of an answer, median, ms (the numbers are keep ratios)")


def _by_selector(rows: Sequence[Row]) -> dict[str, tuple[str, list[Row]]]:
    """Name and rows of each selector, by its colour."""
    names = dict.fromkeys(row.selector for row in rows)
    return {f"C{place}": (name, [row for row in rows if row.selector == name]) for place, name in enumerate(names)}


def _draw(axes: Any, places: Sequence[float], rows: Sequence[Row], **style: str) -> None:  # noqa: ANN401 - matplotlib's
    below = [row.accuracy.mean - row.accuracy.low for row in rows]
    above = [row.accuracy.high - row.accuracy.mean for row in rows]
    means = [row.accuracy.mean for row in rows]
    axes.errorbar(places, means, yerr=[below, above], marker="o", capsize=3, **style)
