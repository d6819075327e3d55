"""A benchmark's rows as a table and as a plot of stacked stage times."""

import io
from collections.abc import Sequence
from itertools import groupby

from rich import filesize
from rich.console import Console
from rich.table import Table

from hawk_trt.apps.bench.bench import STAGES, BenchRow, Spread

_PREFILL = ("preprocess", "vision", "first_layer", "decoder")


def print_rows(rows: Sequence[BenchRow], console: Console) -> None:
    """Print a table for each prompt: milliseconds, and how many times faster than unpruned."""
    for prompt, group in groupby(rows, key=lambda row: row.prompt):
        own = list(group)
        whole = next((row for row in own if row.keep_ratio == 1.0), None)
        table = Table(
            title=f"{prompt}: {own[0].num_tokens} tokens, {own[0].num_visual} of them visual", title_justify="left"
        )
        stages = [stage.replace("_", " ") for stage in STAGES]
        for name in ("keep", "kept", *stages, "first token", "total", "KV", "peak"):
            table.add_column(name, justify="right")
        for row in own:
            table.add_row(
                f"{row.keep_ratio:g}",
                str(row.num_kept),
                *(f"{row.stages[stage].median:.2f}" for stage in STAGES),
                _against(row.first_token, whole.first_token if whole else None),
                _against(row.total, whole.total if whole else None),
                filesize.decimal(row.kv_bytes),
                "-" if row.peak_bytes is None else filesize.decimal(row.peak_bytes),
            )
        console.print(table)
    console.print("ms, medians; score is part of first layer; a ratio is how many times faster than keep 1")


def plot_rows(rows: Sequence[BenchRow]) -> bytes:
    """A PNG: stacked stage times up to the first token, by keep ratio, one panel a prompt."""
    from matplotlib.figure import Figure  # an extra that only plots need

    groups = [(prompt, list(group)) for prompt, group in groupby(rows, key=lambda row: row.prompt)]
    figure = Figure(figsize=(2.5 + 3.2 * len(groups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (prompt, own) in zip(panels, groups, strict=True):
        places = range(len(own))
        bottom = [0.0] * len(own)
        for stage in _PREFILL:
            heights = [row.stages[stage].median for row in own]
            axes.bar(places, heights, bottom=bottom, label=stage.replace("_", " "))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xticks(places, [f"{row.keep_ratio:g}" for row in own])
        axes.set_title(f"{prompt}\n{own[0].num_visual} visual tokens", fontsize="medium")
        axes.set_xlabel("keep ratio")
    panels[0].set_ylabel("ms to the first token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize="small")  # as the bars are stacked
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _against(spread: Spread, whole: Spread | None) -> str:
    ratio = "" if whole is None else f" ({whole.median / spread.median:.2f}x)"
    return f"{spread.median:.1f}{ratio}"
