"""A benchmark's rows by prompt, against the unpruned ones, and as a plot of stacked stage times."""

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import hawk_trt
from hawk_trt.apps.bench.bench import UNPRUNED, BenchRow, Spread

_STYLE = Path(hawk_trt.__file__).parent / "data" / "plots.mplstyle"
_PREFILL = ("preprocess", "vision", "select", "first_layer", "decoder")


def plot_rows(rows: Sequence[BenchRow], title: str) -> bytes:
    """A PNG: stacked stage times up to the first token, with quartiles of their sum, one panel a prompt."""
    from matplotlib import rc_context  # an extra that only plots need
    from matplotlib.figure import Figure

    groups = by_prompt(rows)
    bars = max(len(own) for _, own in groups)
    stages = [stage for stage in _PREFILL if any(row.stages[stage].median > 0 for row in rows)]
    with_selector = not {row.selector for row in rows} <= {UNPRUNED, "hawk"}
    with rc_context(fname=_STYLE):
        figure = Figure(figsize=(2.2 + len(groups) * max(2.6, 0.75 * bars), 4.6))
        figure.suptitle(title)
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (prompt, own) in zip(panels, groups, strict=True):
            places = range(len(own))
            bottom = [0.0] * len(own)
            for stage in stages:
                heights = [row.stages[stage].median for row in own]
                axes.bar(places, heights, 0.7, bottom, label=stage.replace("_", " "))
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            whole = unpruned(own)
            names = []
            for place, top, row in zip(places, bottom, own, strict=True):
                first = row.first_token
                axes.vlines(place, first.low, first.high, color="0.2", linewidth=1)
                text = f"{first.median:.3g} ms\n{against(first, whole.first_token if whole else None).strip()}"
                at = (place, max(top, first.high))
                axes.annotate(text, at, (0, 3), textcoords="offset points", ha="center", fontsize="x-small")
                names.append(
                    f"{row.keep_ratio:g}" + (f"\n{row.selector}" if with_selector and row is not whole else "")
                )
            axes.margins(y=0.15)
            axes.grid(visible=False, axis="x")
            axes.set_xticks(places, names, fontsize="x-small" if with_selector else "medium")
            axes.set_title(f"{prompt}, {own[0].num_visual} visual tokens")
            axes.set_xlabel("keep ratio")
        panels[0].set_ylabel("ms to the first token (medians; lines: quartiles)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")  # as the bars are stacked
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def by_prompt(rows: Sequence[BenchRow]) -> list[tuple[str, list[BenchRow]]]:
    """The rows of each prompt."""
    return [(prompt, list(group)) for prompt, group in groupby(rows, key=lambda row: row.prompt)]


def unpruned(rows: Sequence[BenchRow]) -> BenchRow | None:
    """The row that keeps all tokens, where there is one."""
    return next((row for row in rows if row.keep_ratio == 1.0), None)


def against(spread: Spread, whole: Spread | None) -> str:
    """How many times as fast as the unpruned one."""
    return "" if whole is None else f" ({whole.median / spread.median:.2f}x)"
