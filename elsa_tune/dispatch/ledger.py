"""Who answered this process's calls: how often, and for how long."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple, Protocol

MOST = 4096
"""Rows of layouts that are kept apart; older ones are added up by problem and kernel."""

MOST_PROBLEMS = 4096
"""Problems that are kept apart; others are added up: a growing key cache makes a new one at every step."""

OTHERS = "other problems"

TORCH = "torch"
"""The kernel's name in a row where torch's own served."""


class Served(NamedTuple):
    """A problem of this process, spelled, the kernel that answered it (``torch`` where it was torch's own), its calls and their seconds."""

    problem: str
    kernel: str
    calls: int
    seconds: float


class Counted(Protocol):
    """Somebody who answers calls of one problem and counts them."""

    @property
    def spelled(self) -> tuple[str, str]: ...
    @property
    def calls(self) -> int: ...
    @property
    def seconds(self) -> float: ...


_open: list[Counted] = []
_closed: dict[tuple[str, str], tuple[int, float]] = {}


def enter(counted: Counted) -> None:
    """Count whoever answers from now on."""
    if len(_open) >= MOST:
        _add_up(_open, _closed)
        _open.clear()
    _open.append(counted)


def _add_up(counted: Iterable[Counted], sums: dict[tuple[str, str], tuple[int, float]]) -> None:
    for one in counted:
        problem, kernel = one.spelled
        if one.calls:
            name = (problem if (problem, kernel) in sums or len(sums) < MOST_PROBLEMS else OTHERS, kernel)
            calls, seconds = sums.get(name, (0, 0.0))
            sums[name] = calls + one.calls, seconds + one.seconds


def served() -> list[Served]:
    """What elsa-tune answered in this process, by attention() and in the place of torch's function: longest first. Calls that torch keeps
    for itself before anybody is asked are in no row."""
    sums = dict(_closed)
    _add_up(list(_open), sums)
    rows = [Served(*name, *counts) for name, counts in sums.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def told(rows: Iterable[Served]) -> str:
    """The rows as a table of lines."""
    lines = [f"{row.calls:9}  {row.seconds:10.3f} s  {row.kernel}  {row.problem}" for row in rows]
    return "\n".join(["    calls        time  kernel, problem", *lines])


def _tell() -> None:
    if rows := served():
        print(f"elsa-tune served\n{told(rows)}", file=sys.stderr)
    else:
        print("elsa-tune served nothing", file=sys.stderr)


if os.environ.get("ELSA_TUNE_TRACE", "0") not in ("", "0"):
    atexit.register(_tell)
