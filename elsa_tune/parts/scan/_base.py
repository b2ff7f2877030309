"""A scan strategy is a list of rounds; everything else about it is derived here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Round:
    """For all i in range(first, n, stride) at once: x[i] = x[i - step] merged with x[i]."""

    first: int
    stride: int
    step: int

    def cells(self, n: int) -> range:
        """The cells this round writes."""
        return range(self.first, n, self.stride)

    def merges(self, n: int) -> int:
        """How many merges this round does on n cells."""
        return len(self.cells(n))

    def reads_what_it_writes(self, n: int) -> bool:
        """Whether a parallel execution needs a second buffer: some cell is both read and written."""
        return self.step % self.stride == 0 and self.merges(n) > 1 and self.first + self.step < n


@dataclass(frozen=True)
class Scan:
    """A strategy: its field name, one line about it, and its network for every n.

    ``block`` and ``grid`` name the strategies for states on chip and for states in memory; by default itself.
    """

    name: str
    title: str
    network: Callable[[int], list[Round]]
    block: str = ""
    grid: str = ""

    @cached_property
    def folds(self) -> bool:
        """Whether states are merged one after the other: no round merges two at once."""
        return all(r.merges(8) <= 1 for r in self.network(8))

    @property
    def of_two_levels(self) -> bool:
        """Whether it is one strategy on chip and another in memory."""
        return bool(self.block or self.grid)

    def prefixes(self, n: int) -> list[Round]:
        """Rounds after which cell i holds the merge of cells 0..i, for every i < n."""
        return [r for r in self.network(n) if r.merges(n)]

    def total(self, n: int) -> list[Round]:
        """The same rounds without those that the last cell does not depend on."""
        needed, kept = {n - 1}, []
        for r in reversed(self.prefixes(n)):
            written = needed & set(r.cells(n))
            if written:
                needed |= {i - r.step for i in written}
                kept.append(r)
        return kept[::-1]


def run(rounds: Sequence[Round], cells: Sequence[T], merge: Callable[[T, T], T]) -> list[T]:
    """Execute rounds as a parallel machine would: every read of a round before its first write."""
    x = list(cells)
    for r in rounds:
        for i, value in [(i, merge(x[i - r.step], x[i])) for i in r.cells(len(x))]:
            x[i] = value
    return x


def depth(rounds: Sequence[Round], n: int) -> int:
    """Merges on the longest path to any cell: what bounds time on a machine with enough processors."""
    level = [0] * n
    for r in rounds:
        for i, value in [(i, 1 + max(level[i - r.step], level[i])) for i in r.cells(n)]:
            level[i] = value
    return max(level, default=0)


def draw(scan: Scan, n: int = 8) -> str:
    """The network as text: one line a round, ``o`` where a cell is written, ``.`` where it is read."""
    lines = [f"{scan.name}: {scan.title}", f"all prefixes of {n} states, then the total alone"]
    for rounds in (scan.prefixes(n), scan.total(n)):
        for number, r in enumerate(rounds, 1):
            written, read = set(r.cells(n)), {i - r.step for i in r.cells(n)}
            marks = " ".join("o" if i in written else "." if i in read else "|" for i in range(n))
            lines.append(f"  {marks}   round {number}: {r.merges(n)} merges, reaching back {r.step}")
        lines.append(f"  depth {depth(rounds, n)}, {sum(r.merges(n) for r in rounds)} merges")
    return "\n".join(lines)
