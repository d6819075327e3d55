"""The files of an evaluation beside its results: summary.json, summary.csv and the plots."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from hawk_trt.apps.evaluate.plots import plot_rows
from hawk_trt.apps.evaluate.summary import Row, to_csv
from hawk_trt.errors import InvalidInput


def write_report(folder: Path, rows: Sequence[Row], subject: Mapping[str, str], title: str) -> str | None:
    """Write all of them, each whole or not at all.

    Args:
        folder: where the results are.
        rows: their summary.
        subject: what the results are of.
        title: of the plots.

    Returns:
        Why there are no plots, None where there are.
    """
    summary = msgspec.json.encode({"subject": dict(subject), "rows": msgspec.to_builtins(rows)})
    files = {"summary.json": msgspec.json.format(summary, indent=1) + b"\n", "summary.csv": to_csv(rows).encode()}
    missing = None
    try:
        files |= plot_rows(rows, title)
    except InvalidInput as error:
        missing = str(error)
    for name, content in files.items():
        partial = folder / f".{name}.{os.getpid()}"
        try:
            partial.write_bytes(content)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return missing
