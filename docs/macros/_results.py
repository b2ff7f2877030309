"""What benchmarks measured: the files of benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
TORCH = ("torch flash", "torch math")
"""torch's own kernels among the peers of a race."""


@cache
def read(name: str) -> dict[str, Any]:
    """A file of results, by its name without ``.json``. Raises FileNotFoundError."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """A median and its interval."""
    return f"{found['median']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def fastest(peers: Mapping[str, Mapping[str, float]], names: Iterable[str] = TORCH) -> Mapping[str, float] | None:
    """The fastest of some peers, if any took part."""
    return min((peers[name] for name in names if name in peers), key=lambda peer: peer["ratio"], default=None)


def short(number: str, is_short: bool, at_most: bool = False) -> str:
    """A number of a table, and whether it misses what was asked."""
    return f"{number} (**{'more' if at_most else 'short'}**)" if is_short else number


def spelled(problem_or_variant: str) -> str:
    """A spelling in a table, in one piece: tables scroll."""
    return f'<code style="white-space: nowrap">{problem_or_variant}</code>'
