"""The files of an evaluation beside its results: summary.json, summary.csv, and plots of the accuracy.

The plots show accuracy by keep ratio, and by time with the Pareto front.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import hawk_trt
from hawk_trt.apps.evaluate.summary import Row, pareto_front, to_csv
from hawk_trt.apps.evaluate.trials import UNPRUNED
from hawk_trt.files.staging import write_atomically

_STYLE = Path(hawk_trt.__file__).parent / "data" / "plots.mplstyle"
# Where a point's label may stand, in points from it: the first place that no other label takes.
_LABEL_PLACES = ((7, 6), (7, -13), (-24, 6), (-24, -13), (7, 17), (7, -24), (-24, 17), (-24, -24))


def write_report(folder: Path, rows: Sequence[Row], subject: Mapping[str, str], title: str) -> str | None:
    """Write all of them, each whole or not at all; returns why there are no plots, None where there are.

    subject: what the results are of.
    """
    summary = msgspec.json.encode({"subject": dict(subject), "rows": msgspec.to_builtins(rows)})
    files = {"summary.json": msgspec.json.format(summary, indent=1) + b"\n", "summary.csv": to_csv(rows).encode()}
    missing = None
    try:
        files |= plot_rows(rows, title)
    except ImportError as error:
        missing = f"plots need matplotlib ({error}): pip install matplotlib"
    for name, content in files.items():
        write_atomically(folder / name, content)
    return missing


def plot_rows(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """Draw both plots of one evaluation: PNGs by file name."""
    from matplotlib import rc_context  # an extra that only plots need
    from matplotlib.figure import Figure

    drawn = {}
    for name, draw in (("accuracy_by_keep_ratio", _by_keep_ratio), ("accuracy_by_time", _by_time)):
        with rc_context(fname=_STYLE):
            figure = Figure(figsize=(7.2, 4.5))
            axes = figure.add_subplot(title=title, ylabel="right answers, with the interval of 95 %")
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
            labels = draw(axes, rows)
            figure.legend(loc="outside right upper")
            figure.draw_without_rendering()  # the places of the labels depend on all else
            _label(axes, labels)
            png = io.BytesIO()
            figure.savefig(png, format="png")
        drawn[f"{name}.png"] = png.getvalue()
    return drawn


def _by_keep_ratio(axes: Any, rows: Sequence[Row]) -> list[tuple[float, float, str, str]]:  # noqa: ANN401 - matplotlib's
    selectors = [name for name in _by_selector(rows) if name != UNPRUNED]
    for place, name in enumerate(selectors):
        own = sorted(_by_selector(rows)[name], key=lambda row: row.keep_ratio)
        # beside each other, so that the intervals of equal ratios can be told apart
        shift = 1 + 0.04 * (place - (len(selectors) - 1) / 2)
        _draw(axes, [row.keep_ratio * shift for row in own], own, f"C{place + 1}", name, "-")
    for row in _by_selector(rows).get(UNPRUNED, ()):
        axes.axhline(row.accuracy.mean, color="C0", linestyle="--", label=UNPRUNED)
        axes.axhspan(row.accuracy.low, row.accuracy.high, color="C0", alpha=0.08, linewidth=0)
    ratios = sorted({row.keep_ratio for row in rows if row.selector != UNPRUNED})
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("keep ratio: share of visual tokens kept (logarithmic)")
    return []


def _by_time(axes: Any, rows: Sequence[Row]) -> list[tuple[float, float, str, str]]:  # noqa: ANN401 - matplotlib's
    labels = []
    for place, (name, every) in enumerate(_by_selector(rows).items()):
        timed = [(row.total_ms, row) for row in every if row.total_ms is not None]
        if timed:
            _draw(axes, [time for time, _ in timed], [row for _, row in timed], f"C{place}", name, "none")
        labels += [(time, row.accuracy.mean, f"{row.keep_ratio:g}", f"C{place}") for time, row in timed]
    front = sorted((row.total_ms or 0.0, row.accuracy.mean) for row in pareto_front(rows))
    ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "color": "0.4", "linestyle": ":"}
    axes.plot(
        [time for time, _ in front], [right for _, right in front], label="nothing is better\nin less time", **ring
    )
    axes.set_xlabel("median time of an answer, ms; each point is labelled with its keep ratio")
    return labels


def _label(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:  # noqa: ANN401 - matplotlib's
    """Write a text at each point (x, y, text, colour), where no earlier one is in the way."""
    taken: list[Any] = []
    style = {"textcoords": "offset points", "fontsize": "small", "in_layout": False}
    for x, y, text, colour in labels:
        for offset in _LABEL_PLACES:
            written = axes.annotate(text, (x, y), xytext=offset, color=colour, **style)
            box = written.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            written.set_visible(False)
        taken.append(box)
        written.set_visible(True)


def _by_selector(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each selector; of the unpruned model first, so that every selector has one colour in both plots."""
    names = sorted({row.selector: None for row in rows}, key=lambda name: name != UNPRUNED)
    return {name: [row for row in rows if row.selector == name] for name in names}


def _draw(axes: Any, places: Sequence[float], rows: Sequence[Row], colour: str, name: str, line: str) -> None:  # noqa: ANN401 - matplotlib's
    means = [row.accuracy.mean for row in rows]
    below = [row.accuracy.mean - row.accuracy.low for row in rows]
    above = [row.accuracy.high - row.accuracy.mean for row in rows]
    axes.errorbar(places, means, yerr=[below, above], marker="o", color=colour, label=name, linestyle=line)
