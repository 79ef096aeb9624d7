"""The only module that prints. Data goes to stdout, everything said to the user to stderr."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_err = Console(stderr=True, highlight=False, soft_wrap=True)
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def say(message: str) -> None:
    """One line to the user (stderr). Square brackets are printed as they are."""
    _err.print(message, markup=False)


def warn(message: str) -> None:
    _err.print("warning: " + message, markup=False, style="yellow")


def error(message: str, hint: str | None = None) -> None:
    """`error: ...`, and after a blank line `hint: ...`."""
    _err.print("error: " + message, markup=False, style="red")
    if hint:
        _err.print("\nhint: " + hint, markup=False)


def data(text: str) -> None:
    """Plain data to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def data_json(value: object) -> None:
    """One JSON document to stdout."""
    data(json.dumps(value, indent=2, default=str))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: bool = False) -> None:
    """A table to stdout; columns after the first to the right, for they are numbers, unless `left`."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 or left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    _out.print(grid, soft_wrap=False)


def facts(record: Mapping[str, Any], indent: int = 0) -> None:
    """A nested record to stdout, one fact a line; long lists are counted, not printed."""
    width = max((len(key) for key in record), default=0) + 2
    for key, value in record.items():
        start = " " * indent + key.ljust(width)
        if isinstance(value, Mapping) and value:
            data(" " * indent + key)
            facts(value, indent + 2)
        elif isinstance(value, list | tuple) and (
            len(value) > 8 or any(isinstance(v, Mapping | list | tuple) for v in value)
        ):
            data(f"{start}{len(value)} items")
        elif isinstance(value, list | tuple):
            data(start + (", ".join(plain(v) for v in value) or "-"))
        else:
            data(start + plain(value))


class Bar:
    """A progress bar on a terminal, a line every 10 % elsewhere; `advance` may carry a note: a loss, say."""

    def __init__(self, title: str, total: int, done: int, shown: bool) -> None:
        self._title, self._total, self._done, self._shown = title, max(total, 1), done, shown
        self._spoken = done * 10 // self._total
        self._progress: Progress | None = None
        if shown and _err.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(show_speed=True),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=_err,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if self._progress is not None:
            self._progress.update(self._task, advance=count, note=note)
        elif self._shown and self._done * 10 // self._total > self._spoken:
            self._spoken = self._done * 10 // self._total
            say(f"{self._title}: {self._done}/{self._total} {note}".rstrip())


@contextmanager
def progress(title: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """A progress bar with rate and ETA around a loop of `total` items of which `done` are done.

    One that is not `shown` is silent: of several ranks the first speaks.
    """
    bar = Bar(title, total, done, shown)
    if bar._progress is not None:
        with bar._progress:
            yield bar
    else:
        yield bar


def plain(value: Any) -> str:  # noqa: ANN401 - whatever a table holds
    """A value as a table shows it: 3 significant digits, a dash for None."""
    if value is None or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
