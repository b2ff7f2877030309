"""A run as people watch it: one screen of a terminal that never scrolls, or lines on a log file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elsa_tune.shell import screen
from elsa_tune.tuning.task import OfFamily, Progress

_LINE_EVERY = 15.0


class LiveProgress:
    """One screen that is redrawn while tuning and never scrolls; on a log file, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True, vertical_overflow="crop")
        self._last_line = 0.0

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._console.is_terminal:
            self._live.update(Board(progress, time.monotonic()))
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            trials = sum(task.trials for task in progress.tasks)
            self._console.print(f"{progress.left:4.0f} s left, {trials} trials, {progress.doing}", highlight=False)


@dataclass(frozen=True, slots=True)
class Board:
    """What a run knew at a moment (of time.monotonic()), within the lines of the terminal: families, what is done, seconds left."""

    progress: Progress
    moment: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        families = self.progress.families
        room = max(1, console.size.height - 4)  # beside a head, two lines below and the cursor's
        shown = sorted(families, key=lambda f: f.trials >= f.target)[:room]  # those at work first
        yield _board(sorted(shown, key=lambda f: f.family), console.width)
        left = max(0.0, self.progress.left - (time.monotonic() - self.moment))
        hidden = f"; {len(families) - len(shown)} families more" if len(shown) < len(families) else ""
        for line in (f"{left:.0f} s left{hidden}; best: ratio to torch's own", self.progress.doing):
            yield Text(line, no_wrap=True, overflow="ellipsis")


_LEAST_NAME = 12
"""Columns of a terminal that a family's name has at least; where that leaves too few, failures are not shown."""


def _board(families: Sequence[OfFamily], width: int) -> Table:
    """A line a family, names shortened so that numbers fit."""
    numbers = {
        "best": [screen.number(f.best, ".2f") for f in families],
        "trials": [f"{f.trials}/{f.target}" for f in families],
        "failures": [str(f.failures) for f in families],
    }
    widths = {name: 2 + max(map(len, (name, *cells))) for name, cells in numbers.items()}
    if width - sum(widths.values()) < _LEAST_NAME:
        del numbers["failures"], widths["failures"]
    table = screen.listing("family", *numbers)
    table.columns[0].no_wrap, table.columns[0].overflow = True, "ellipsis"
    table.columns[0].max_width = max(1, width - sum(widths.values()) - 1)
    for family, *cells in zip(families, *numbers.values(), strict=True):
        table.add_row(family.family, *cells)
    return table
