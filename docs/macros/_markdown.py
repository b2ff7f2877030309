"""Text for pages: tables, and sentences of the program in them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells, each of one line."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *(map(_within_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _within_cell(text: str) -> str:
    """A bar ends a cell, but not in code."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", text)


def code(*words: object) -> str:
    """Words that one types."""
    return ", ".join(f"`{word}`" for word in words)


def said(text: str | None, by: str) -> str:
    """What the program says of a thing, in one line. Raises ValueError where it says nothing: a page would, too."""
    if not text or not text.strip():
        raise ValueError(f"{by} says nothing of itself; write a docstring or a meaning, which the reference shows")
    return " ".join(inspect.cleandoc(text).replace("``", "`").split())
