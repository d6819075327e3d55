"""The files of an evaluation beside its results: summary.json, summary.csv and the plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from hawk_trt.apps.evaluate.plots import plot_rows
from hawk_trt.apps.evaluate.summary import Row, to_csv
from hawk_trt.errors import InvalidInput
from hawk_trt.files import write_atomically


def write_report(folder: Path, rows: Sequence[Row], subject: Mapping[str, str], title: str) -> str | None:
    """Write all of them, each whole or not at all; returns why there are no plots, None where there are.

    Args:
        folder: where the results are.
        rows: their summary.
        subject: what the results are of.
        title: of the plots.
    """
    summary = msgspec.json.encode({"subject": dict(subject), "rows": msgspec.to_builtins(rows)})
    files = {"summary.json": msgspec.json.format(summary, indent=1) + b"\n", "summary.csv": to_csv(rows).encode()}
    missing = None
    try:
        files |= plot_rows(rows, title)
    except InvalidInput as error:
        missing = str(error)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return missing
