"""Figures, drawn when the site is built: scan networks by the program itself, results by what benchmarks measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from elsa_tune.parts import scan as scans
from elsa_tune.problem import Problem

from ._results import device_of, read

STATES = 16
"""Of the networks drawn."""


def networks() -> str:
    """Every scan strategy: its network, and what it costs, counted."""
    table = ["| scan | depth | merges | the total alone: depth | merges |", "|---|---|---|---|---|"]
    figures = []
    for name in scans.names():
        scan = scans.get(name)
        costs = [
            number
            for rounds in (scan.prefixes(STATES), scan.total(STATES))
            for number in (scans.depth(rounds, STATES), sum(r.merges(STATES) for r in rounds))
        ]
        table.append(f"| `{name}` | " + " | ".join(map(str, costs)) + " |")
        figures.append(_figure(scans.svg(scan, STATES), f"<code>{name}</code>: {scan.title}"))
    return "\n".join(['<div class="networks">', *figures, "</div>", "", *table, ""])
