"""Progress of long work: bars on a terminal; without one a line every tenth, for what takes more than moments.

Functions that take long accept a `Progress`, a plain function of (label, done, total); what is counted is theirs to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

Progress = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


MOMENTS = 2.0
"""Seconds of work on a label before its first line appears, where there is no terminal."""


@contextmanager
def bars(
    console: Console | None = None,
    unit: Literal["bytes", "items"] = "bytes",
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Yields a Progress that draws one bar a label; labels may come and go in any order."""
    console = console or Console(highlight=False, stderr=True)
    if not console.is_terminal:
        yield _lines(console, unit, clock)
        return
    counted: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if unit == "bytes":
        counted = (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with RichProgress(*columns, console=console, transient=True) as shown:
        known: dict[str, TaskID] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in known:
                known[label] = shown.add_task(label, total=total)
            shown.update(known[label], completed=done, total=total)

        yield update


def size(count: float) -> str:
    """`1234567` → `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _lines(console: Console, unit: str, clock: Callable[[], float]) -> Progress:
    """A line at every tenth of a label that takes longer than MOMENTS."""
    started: dict[str, float] = {}
    shown: dict[str, int] = {}

    def update(label: str, done: int, total: int) -> None:
        now = clock()
        tenth = 10 * done // total if total else 10
        if now - started.setdefault(label, now) < MOMENTS or tenth <= shown.get(label, -1):
            return
        shown[label] = tenth
        counts = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:,} of {total:,}"
        console.print(f"{label}: {counts} ({10 * tenth}%)")

    return update
