"""A progress bar with the time left on a terminal, a line now and then elsewhere; on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hawk_trt.apps.cli.output import note

_LINES = 10

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass items on and show how many have come.

    Args:
        items: what is waited for.
        total: how many there will be.
        what: their name, in the plural.
    """
    if not sys.stderr.isatty():
        begun = time.monotonic()
        for number, item in enumerate(items, start=1):
            if number * _LINES // total > (number - 1) * _LINES // total:
                seconds_left = (time.monotonic() - begun) / number * (total - number)
                left = f", about {seconds_left:.0f} s left" if seconds_left >= 1 else ""
                note(f"{number} of {total} {what}{left}")
            yield item
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            bar.advance(task)
            yield item
