"""What commands print: results and JSON on stdout; notes and progress on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from rich.filesize import decimal

if TYPE_CHECKING:
    from rich.table import Table

size = decimal  # of bytes, for people: "6.3 MB"
# Lines that tell of progress where no bar can be drawn: at most one in so many seconds.
_SECONDS_BETWEEN_LINES = 2.0

Item = TypeVar("Item")


def print_json(*parts: object) -> None:
    """Print dataclasses and mappings, joined, as one JSON object on stdout; arrays become lists."""
    fields: dict[str, Any] = {}
    for part in parts:
        fields |= msgspec.to_builtins(part, enc_hook=_plain)
    print(msgspec.json.format(msgspec.json.encode(fields), indent=1).decode())


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(*columns: str, left: int = 0, gap: int = 2, title: str | None = None) -> "Table":
    """An empty table for the terminal; its first columns stand to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD  # for those who print one
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    for place, name in enumerate(columns):
        made.add_column(name, justify="left" if place < left else "right", no_wrap=True)
    return made


@contextmanager
def progress(what: str, *, in_bytes: bool = False) -> Iterator[Callable[[float, float], None]]:
    """Show how far something is: a bar with the time left on a terminal, a line now and then elsewhere.

    Yields a function to call with how many are done and how many there are in all. what: their name, in the plural.
    """
    if not sys.stderr.isatty():
        yield _lines(what, in_bytes=in_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass items on and show how many of them have come."""
    with progress(what) as show:
        for number, item in enumerate(items, start=1):
            show(number, total)
            yield item


def _lines(what: str, *, in_bytes: bool) -> Callable[[float, float], None]:
    begun = printed_at = time.monotonic()

    def show(done: float, total: float) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at < _SECONDS_BETWEEN_LINES and done < total:
            return
        printed_at = now
        told = f"{size(int(done))} of {size(int(total))}" if in_bytes else f"{done:g} of {total:g}"
        seconds_left = (now - begun) / done * (total - done) if done else 0.0
        note(f"{told} {what}" + (f", about {seconds_left:.0f} s left" if seconds_left >= 1 else ""))

    return show


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
