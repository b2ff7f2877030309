"""Who answered this process's calls: how often, and for how long."""

from __future__ import annotations

import atexit
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

from elsa_tune.device import Device
from elsa_tune.errors import BadDevice, BadProblem
from elsa_tune.generate.backends import Counts
from elsa_tune.problem import Problem
from elsa_tune.traffic import Asked, merged

MOST = 4096
"""Rows that are kept apart; of later ones, those that are served alike share a row, up to twice as many, and all others are one: a growing
key cache poses a new problem at every step."""

OTHERS = "other problems"

TORCH = "torch"
"""The kernel's name in a row where torch's own served."""


class Served(NamedTuple):
    """A problem of this process, spelled, the kernel that answered it (``torch`` where it was torch's own), its calls and their seconds,
    and the device, spelled."""

    problem: str
    kernel: str
    calls: int
    seconds: float
    device: str


class Row:
    """A problem and who answers it, counted; ``elsewhere`` says what is counted outside Python, calls and seconds."""

    __slots__ = ("calls", "elsewhere", "seconds")

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.elsewhere: Counts | None = None

    def count(self, since: float) -> None:
        """A call was answered that began then, by perf_counter()."""
        self.calls += 1
        self.seconds += perf_counter() - since

    def counts(self) -> tuple[int, float]:
        """Calls, and their seconds."""
        calls, seconds = self.elsewhere() if self.elsewhere else (0, 0.0)
        return self.calls + calls, self.seconds + seconds


_rows: dict[tuple[str, str, str], Row] = {}


def row(problem: Problem | str, kernel: str, device: str = "") -> Row:
    """Where calls of a problem, or of what is none, that a kernel answers on a device are counted."""
    name, most = (str(problem), kernel, device), MOST
    if name not in _rows and len(_rows) >= MOST and isinstance(problem, Problem):
        name, most = (str(problem.nearby), kernel, device), 2 * MOST
    if name not in _rows and len(_rows) >= most:
        name = (OTHERS, kernel, device)
    return _rows.setdefault(name, Row())


def forget() -> None:
    """What was counted."""
    _rows.clear()


def served() -> list[Served]:
    """What elsa-tune answered in this process, by attention() and in the place of torch's function: longest first. Calls that torch keeps
    for itself before anybody is asked are in no row."""
    found = [Served(problem, kernel, *one.counts(), device) for (problem, kernel, device), one in list(_rows.items())]
    return sorted((one for one in found if one.calls), key=lambda one: -one.seconds)


def asked_of_torch(rows: Iterable[Served]) -> dict[Device, list[Asked]]:
    """What torch's own kernel answered on each device, of problems: those that are served alike as one, those of most seconds first."""
    found: dict[Device, list[Asked]] = defaultdict(list)
    for row in rows:
        if row.kernel == TORCH:
            with suppress(BadProblem, BadDevice):  # what poses none, a device that no kernel of ours is for
                found[Device.parse(row.device)].append(Asked(Problem.parse(row.problem), row.calls, row.seconds))
    return {device: merged(asked) for device, asked in found.items()}


def told(rows: Iterable[Served]) -> str:
    """The rows as a table of lines."""
    lines = [f"{one.calls:9}  {one.seconds:10.3f} s  {one.kernel}  {one.problem}" for one in rows]
    return "\n".join(["    calls        time  kernel, problem", *lines])


def _tell() -> None:
    found = served()
    print(f"elsa-tune served\n{told(found)}" if found else "elsa-tune served nothing", file=sys.stderr)


if os.environ.get("ELSA_TUNE_TRACE", "").lower() not in ("", "0", "false", "no", "off"):
    atexit.register(_tell)
