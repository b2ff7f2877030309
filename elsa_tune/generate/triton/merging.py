"""How the states of splits are merged: rows at once, warps, and the order of loads and merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elsa_tune.generate.triton.columns import parts
from elsa_tune.parts.scan import Round
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

FINISH_REGISTERS = 32
"""Registers of a thread for the states of all splits of some query rows."""


def finish(variant: Variant, problem: Problem) -> tuple[int, int]:
    """Query rows whose split states are merged at once, up to 16, and warps of a kernel of its own that does so: there, the states
    of all splits take FINISH_REGISTERS registers of a thread, unless one row takes more."""
    axes = variant.axes
    columns = sum(part.size for part in parts(problem.value_dim, str(axes["dims"])))
    if axes["schedule"] == "last_block":
        return min(16, int(axes["block_m"])), int(axes["warps"])
    fit = FINISH_REGISTERS * 32 * 4 // (columns * int(axes["splits"]))
    rows = 1 << (max(1, min(16, fit)).bit_length() - 1)
    return rows, max(1, min(4, rows * columns // 32))


def merges(rounds: Sequence[Round], n: int) -> list[tuple[int, ...]]:
    """What the last of n states needs of the rounds, one after the other: (i,) loads state i, (i, j) merges state i into state j. Of
    two states that meet, the earlier is complete before the later is begun, so that few are kept: the merges are the rounds'."""
    trees: list[Any] = [(i,) for i in range(n)]
    for r in rounds:
        for i in reversed(r.cells(n)):
            trees[i] = (trees[i - r.step], trees[i], (i - r.step, i))

    def steps(tree: Any) -> list[tuple[int, ...]]:
        return [tree] if len(tree) == 1 else [*steps(tree[0]), *steps(tree[1]), tree[2]]

    return steps(trees[n - 1])
